//! The command line of `wan`. Must not know: how the relay works.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::mpsc;

use clap::{Args, Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};

use crate::control::parse_queue;
use crate::control_socket::{self, ControlAddress, ControlSocket};
use crate::error::WanError;
use crate::link::{LinkOptions, Queue};
use crate::selftest;
use crate::units::{Probability, Rate, SPAN_MAX, Span, parse_rate_limit};
use crate::wan::{Wan, WanOptions};

/// A WAN in a UDP relay: rate, delay, jitter, loss, a queue, and a link that can be cut. Needs no privileges.
#[derive(Debug, Parser)]
#[command(
    name = "wan",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Example:\n  wan --to 127.0.0.1:4433 --rate 100Mbit/s --rtt 40ms --control unix:/tmp/wan.sock\n  \
                  wan ctl unix:/tmp/wan.sock cut"
)]
pub struct Cli {
    /// Instead of relaying.
    #[command(subcommand)]
    pub verb: Option<Verb>,
    /// The relay.
    #[command(flatten)]
    pub relay: RelayArgs,
}

/// What else the program does.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Sends paced UDP through a relay of its own on loopback and prints how well rate and delay are kept
    #[command(after_help = "Example:\n  wan selftest --rate 1Gbit/s --rtt 20ms")]
    Selftest(selftest::SelftestArgs),
    /// Sends one command to a running relay and prints its answer (JSON)
    #[command(
        after_help = "Examples:\n  wan ctl unix:/tmp/wan.sock stats\n  wan ctl 127.0.0.1:7000 set rate=10Mbit/s loss=1%"
    )]
    Ctl {
        /// The relay's control address, as its ready line says it
        address: ControlAddress,
        /// stats, reset, cut [up|down], mend [up|down], set [up|down] KEY=VALUE.., quit
        #[arg(required = true)]
        command: Vec<String>,
    },
}

/// What the relay is like.
#[derive(Debug, Args)]
pub struct RelayArgs {
    /// Where clients send to; port 0 picks a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Where their datagrams go
    #[arg(long, required = true)]
    pub to: Option<SocketAddr>,
    /// The link, the same both ways
    #[command(flatten)]
    pub link: LinkArgs,
    /// Where to take commands: unix:PATH or 127.0.0.1:PORT
    #[arg(long, value_name = "ADDRESS")]
    pub control: Option<ControlAddress>,
    /// Fixes losses and jitter
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Most clients at a time
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub max_clients: u32,
    /// Forget a client after so long a silence
    #[arg(long, value_name = "TIME", default_value = "300s")]
    pub idle: Span,
}

/// One direction, as options.
#[derive(Debug, Args)]
pub struct LinkArgs {
    /// The bottleneck each way, over payload + 28 bytes a datagram: 100Mbit/s, or unlimited
    #[arg(long, default_value = "unlimited", value_parser = parse_rate_argument)]
    pub rate: RateLimit,
    /// Round-trip time: twice the delay
    #[arg(long, value_name = "TIME", conflicts_with = "delay")]
    pub rtt: Option<Span>,
    /// One-way delay
    #[arg(long, value_name = "TIME")]
    pub delay: Option<Span>,
    /// The delay varies by so much, up and down, without reordering
    #[arg(long, value_name = "TIME", default_value = "0ms")]
    pub jitter: Span,
    /// Draw the jitter for each datagram alone, so that they overtake each other
    #[arg(long)]
    pub reorder: bool,
    /// Share of the datagrams that get lost: 0.1%
    #[arg(long, value_name = "SHARE", default_value = "0%")]
    pub loss: Probability,
    /// What may wait before the bottleneck: a time (100ms) or a size (64KiB)
    #[arg(long, value_name = "LIMIT", default_value = "100ms", value_parser = parse_queue)]
    pub queue: Queue,
    /// Drop datagrams of more than so many bytes, headers included; without it any size passes
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u64>,
}

/// A rate or none, as one value of an option.
#[derive(Clone, Copy, Debug)]
pub struct RateLimit(pub Option<Rate>);

fn parse_rate_argument(text: &str) -> Result<RateLimit, String> {
    parse_rate_limit(text).map(RateLimit)
}

impl LinkArgs {
    /// The options of both directions.
    pub fn options(&self) -> LinkOptions {
        let delay = self.delay.or(self.rtt.map(|Span(rtt)| Span(rtt / 2))).unwrap_or_default();
        LinkOptions {
            rate: self.rate.0,
            delay: delay.0,
            jitter: self.jitter.0,
            loss: self.loss,
            queue: self.queue,
            reorder: self.reorder,
            mtu: self.mtu,
        }
    }
}

/// Does what the command line says; returns when the relay has been told to end.
///
/// # Errors
/// Any [`WanError`]; its [`WanError::exit_status`] is the program's.
pub fn run(cli: Cli) -> Result<(), WanError> {
    match cli.verb {
        Some(Verb::Selftest(args)) => selftest::run(&args),
        Some(Verb::Ctl { address, command }) => {
            println!("{}", control_socket::ask(&address, &command.join(" "))?);
            Ok(())
        }
        None => relay(&cli.relay),
    }
}

fn relay(args: &RelayArgs) -> Result<(), WanError> {
    let to = args.to.ok_or_else(|| WanError::Usage("--to ADDRESS is missing: where shall the datagrams go?".into()))?;
    if to.port() == 0 {
        return Err(WanError::Usage(format!("--to {to}: port 0 is no target")));
    }
    if args.idle.0.is_zero() || args.idle.0 > SPAN_MAX {
        return Err(WanError::Usage("--idle must be more than 0".into()));
    }
    // Blocked before any thread starts, so that all inherit it and only the waiting thread gets them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals
        .thread_block()
        .map_err(|errno| WanError::System { action: "block SIGTERM and SIGINT", source: errno.into() })?;

    let link = args.link.options();
    let wan = Wan::start(WanOptions {
        listen: args.listen,
        to,
        up: link,
        down: link,
        seed: args.seed,
        max_clients: args.max_clients as usize,
        idle: args.idle.0,
    })?;
    let (quit, told_to_quit) = mpsc::channel();
    let by_signal = quit.clone();
    std::thread::Builder::new()
        .name("wan-signals".into())
        .spawn(move || {
            let _ = signals.wait();
            // Nobody listening means that the program is ending already.
            let _ = by_signal.send(());
        })
        .map_err(WanError::system("start the signal thread"))?;
    let control = match &args.control {
        Some(address) => Some(ControlSocket::serve(address, wan.handle(), quit)?),
        None => None,
    };
    let control_text = control.as_ref().map_or("-".to_owned(), |socket| socket.address().to_string());
    say(&format!("ready listen={} control={control_text}", wan.local_addr()));
    // The signal thread holds a sender, so this ends by a message.
    let _ = told_to_quit.recv();
    let stats = wan.stats()?;
    say(&serde_json::to_string(&stats)
        .map_err(|error| WanError::System { action: "print the final counters", source: error.into() })?);
    Ok(())
}

/// A line on stdout, at once. A reader that has gone must not end the relay.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn options_become_a_link() {
        let line = "wan --to 127.0.0.1:9 --rate 100Mbit/s --rtt 40ms --loss 0.1% --queue 64KiB --jitter 2ms --mtu 1500";
        let link = Cli::try_parse_from(line.split(' ')).unwrap().relay.link.options();
        assert_eq!(link.rate.unwrap().bits_per_second(), 100_000_000);
        assert_eq!(link.delay, Duration::from_millis(20));
        assert_eq!(link.queue, Queue::Bytes(65536));
        assert_eq!(link.mtu, Some(1500));
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "wan",
            "wan --to nowhere",
            "wan --to 127.0.0.1:9 --rtt 40ms --delay 20ms",
            "wan --to 127.0.0.1:9 --rate 100",
            "wan --to 127.0.0.1:9 --control /tmp/x",
            "wan --to 127.0.0.1:9 --max-clients 0",
            "wan ctl unix:/tmp/x",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        assert!(Cli::try_parse_from(["wan", "selftest"]).is_ok());
    }
}
