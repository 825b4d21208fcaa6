//! The command line of `tools/torture`; the help that users see is in that file, for there is nothing built yet when they
//! ask for it. Must not know what is done with it.

use blockferry_lab::cli::RunOptions;
use blockferry_wan::units::{Rate, Span, parse_size};
use clap::Parser;

/// Relocates a real image between three sites while clients write to it, kills and cuts off the sites at random moments,
/// does what operators do in between, and checks after every restart that nothing acknowledged is lost.
#[derive(Debug, Parser)]
#[command(name = "torture-run", after_help = "Example:\n  torture-run --cycles 50 --seed 7")]
pub struct Cli {
    /// How many times something is killed or cut [default: 200; with --quick 20]
    #[arg(long, value_name = "N")]
    pub cycles: Option<u64>,
    /// Decides what is written, and what is done when
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// A small image and short pauses: about a minute
    #[arg(long)]
    pub quick: bool,
    /// The image's size [default: 256MiB; with --quick 64MiB]
    #[arg(long, value_parser = parse_size)]
    pub size: Option<u64>,
    /// The WAN's rate, each way: slow, so that a relocation spans many cycles
    #[arg(long, default_value = "16Mbit/s")]
    pub rate: Rate,
    /// The WAN's round trip
    #[arg(long, value_name = "TIME", default_value = "20ms")]
    pub rtt: Span,
    /// Where things are and go
    #[command(flatten)]
    pub run: RunOptions,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["torture", "--cycles", "3", "--rate", "8Mbit/s", "--size", "64MiB"]).unwrap();
        assert_eq!((cli.cycles, cli.rate.bits_per_second(), cli.size), (Some(3), 8_000_000, Some(64 << 20)));
    }

    #[test]
    fn the_help_of_the_script_has_every_option() {
        let missing = blockferry_lab::cli::missing_in(include_str!("../../torture"), &Cli::command());
        assert!(missing.is_empty(), "{missing:?}");
    }
}
