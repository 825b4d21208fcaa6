//! See `targets::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| blockferry_fuzz::targets::control(data));
