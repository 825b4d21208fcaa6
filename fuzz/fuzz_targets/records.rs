//! See `targets::records`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockferry_fuzz::targets::records(data));
