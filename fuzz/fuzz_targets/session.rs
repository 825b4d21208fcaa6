//! See `targets::session`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        // Rust's own start does that, and libFuzzer's does not: a client may write to a server that has hung up.
        // SAFETY: nothing else runs yet.
        unsafe { nix::libc::signal(nix::libc::SIGPIPE, nix::libc::SIG_IGN) };
    },
    |data: &[u8]| blockferry_fuzz::targets::session(data)
);
