//! The program `blockferry`: everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    blockferry::cli::main()
}
