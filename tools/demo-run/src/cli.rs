//! The command line of `tools/demo`; the help that users see is in that file, for there is nothing built yet when they
//! ask for it. Must not know what is done with it.

use blockferry_lab::cli::RunOptions;
use blockferry_wan::units::{Rate, Span, parse_size};
use clap::Parser;

/// Relocates three similar disk images between two sites over an emulated WAN while a client reads and writes them,
/// checks every byte, and prints where each byte came from.
#[derive(Debug, Parser)]
#[command(name = "demo-run", after_help = "Example:\n  demo-run --rate 50Mbit/s --rtt 80ms")]
pub struct Cli {
    /// Small images from this machine's files: too small for the bound on bytes
    #[arg(long)]
    pub quick: bool,
    /// The size of each image [default: 1GiB; with --quick 64MiB]
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    /// The WAN's rate, each way
    #[arg(long, default_value = "100Mbit/s")]
    pub rate: Rate,
    /// The WAN's round trip
    #[arg(long, value_name = "TIME", default_value = "40ms")]
    pub rtt: Span,
    /// Where things are and go
    #[command(flatten)]
    pub run: RunOptions,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["demo", "--rate", "1Gbit/s", "--rtt", "5ms", "--size", "64MiB"]).unwrap();
        assert_eq!((cli.rate.bits_per_second(), cli.size), (1_000_000_000, Some(64 << 20)));
    }

    #[test]
    fn the_help_of_the_script_has_every_option() {
        use clap::CommandFactory;
        let missing = blockferry_lab::cli::missing_in(include_str!("../../demo"), &Cli::command());
        assert!(missing.is_empty(), "{missing:?}");
    }
}
