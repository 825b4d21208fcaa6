//! See `targets::data`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockferry_fuzz::targets::data(data));
