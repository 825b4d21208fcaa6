//! See `targets::frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockferry_fuzz::targets::frame(data));
