//! The command line's grammar: verbs, options and their help.
//! Must not know what the verbs do.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::core::ids::{BlockSize, Name};
use crate::units::{ByteSize, Rate, RateLimit, Span};

use super::fleet::Remote;

/// Moves a VM's disk between data centres while the VM keeps running, and sends only what the other side does not have.
#[derive(Debug, Parser)]
#[command(
    name = "blockferry",
    version,
    max_term_width = 100,
    after_help = "Exit status: 0 done; 1 the operation failed (one line on stderr says what to do next);\n\
                  2 wrong usage or configuration."
)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Make this site's identity and a commented configuration, and print the fingerprint that peers pin.
    ///
    /// Nothing that is there already is overwritten: run it again to see the fingerprint again.
    #[command(after_help = "Example:\n  blockferry init --state /var/lib/blockferry --name site-a")]
    Init(InitArgs),
    /// Run the site's daemon: store, volumes, peer endpoint, NBD, control socket.
    ///
    /// Prints one line `ready ...` on stdout when it serves. SIGTERM drains, flushes and exits 0.
    #[command(after_help = "Example:\n  blockferry serve --config /etc/blockferry.toml")]
    Serve(ServeArgs),
    /// Images that this site owns and serves by NBD.
    #[command(subcommand, after_help = "Example:\n  blockferry volume add web-01 --image /srv/web-01.raw")]
    Volume(VolumeVerb),
    /// Bring volumes here: said at the destination. Each is served at once, on demand, and copied meanwhile.
    ///
    /// This command ends when it is settled for each volume: it is owned and served here (with --wait: all of it is
    /// here), or it will not be, and then the exit status is 1. A hand-over that is not settled 30 s after its --timeout
    /// is not waited for any longer: the exit status is 1, too, and `blockferry status` tells what becomes of it. What
    /// several volumes have in common is fetched once. Copies go on in the daemon, whether somebody waits or not.
    #[command(after_help = "Examples:\n  \
        blockferry relocate site-b/web-01 --image /srv/web-01.raw --wait\n  \
        blockferry relocate site-b/web-01 site-b/web-02 --bulk-rate 50Mbit/s\n  \
        blockferry relocate --fleet fleet.txt --wait\n\n\
        A fleet file has a line `PEER/NAME [PATH]` for each volume; a PATH is relative to the file, and\n\
        lines that begin with # are comments.")]
    Relocate(RelocateArgs),
    /// Show the site, or one volume: phase, blocks, where reads came from, bytes moved, time left.
    #[command(after_help = "Examples:\n  blockferry status\n  blockferry status web-01 --watch\n  \
        blockferry status --json | jq '.volumes[].phase'")]
    Status(StatusArgs),
    /// Pause a volume's bulk copy; what its guest reads still comes.
    #[command(after_help = "Example:\n  blockferry pause web-01")]
    Pause(NamedArgs),
    /// Let a paused bulk copy go on.
    #[command(after_help = "Example:\n  blockferry resume web-01")]
    Resume(NamedArgs),
    /// Limit a volume's bulk copy.
    #[command(after_help = "Examples:\n  blockferry limit web-01 20Mbit/s\n  blockferry limit web-01 unlimited")]
    Limit(LimitArgs),
    /// Give a relocation up: the volume is its source's again. Said at the destination.
    ///
    /// Refused once a guest has written here, since that would be lost; --discard-writes throws it away, and this
    /// command then says how much that was.
    #[command(after_help = "Examples:\n  blockferry cancel web-01\n  blockferry cancel web-01 --discard-writes")]
    Cancel(CancelArgs),
    /// End a relocation without the site at its other end, because that site is lost for good.
    ///
    /// A person's decision: while the peer may come back, wait for it instead. At the source, the volume is owned and
    /// served here again, as it was when it left: what was written at the destination since then is lost. At the
    /// destination, what never arrived is given up. This command says what is lost. Should the peer come back, it is
    /// fenced: it serves the volume no more and says why.
    ///
    /// N is the epoch that `blockferry status NAME` shows: it proves that you looked.
    #[command(after_help = "Example:\n  blockferry status web-01\n  blockferry reclaim web-01 --epoch 3")]
    Reclaim(ReclaimArgs),
    /// Fill this site's store from images that lie here, so that similar volumes need not send what these have.
    #[command(after_help = "Example:\n  blockferry prewarm --image /srv/templates/*.raw")]
    Prewarm(PrewarmArgs),
    /// Work out how much dedup would save, before anything moves. Needs no daemon.
    #[command(after_help = "Examples:\n  \
        blockferry analyze web-*.raw --prewarmed template.raw\n  \
        blockferry analyze web-01.raw --link 100Mbit/s --rtt 40ms --json")]
    Analyze(AnalyzeArgs),
    /// The sites that this one has to do with.
    #[command(subcommand, after_help = "Example:\n  blockferry peer accept site-b")]
    Peer(PeerVerb),
    /// The content store.
    #[command(subcommand, after_help = "Example:\n  blockferry store stats")]
    Store(StoreVerb),
}

/// How the daemon is found.
#[derive(Debug, Default, Args)]
pub(super) struct DaemonArgs {
    /// The daemon's control socket.
    #[arg(long, value_name = "PATH", env = "BLOCKFERRY_SOCKET", help_heading = "Which daemon")]
    pub socket: Option<PathBuf>,
    /// The daemon's configuration, which names the socket.
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_CONFIG", help_heading = "Which daemon")]
    pub config: Option<PathBuf>,
    /// The daemon's state directory, which has the configuration or the socket.
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_STATE", help_heading = "Which daemon")]
    pub state: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Where to put identity and configuration [default: /var/lib/blockferry for root, else ~/.local/state/blockferry].
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_STATE")]
    pub state: Option<PathBuf>,
    /// How the site is to be called [default: the host's name].
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The configuration [default: blockferry.toml in the state directory].
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_CONFIG")]
    pub config: Option<PathBuf>,
    /// The state directory whose blockferry.toml is meant.
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_STATE")]
    pub state: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum VolumeVerb {
    /// Serve an image under a name. This site becomes its owner.
    #[command(after_help = "Example:\n  blockferry volume add web-01 --image /srv/web-01.raw")]
    Add(VolumeAddArgs),
    /// List all volumes.
    #[command(after_help = "Example:\n  blockferry volume list")]
    List(ListArgs),
    /// Show one volume.
    #[command(after_help = "Example:\n  blockferry volume show web-01 --json")]
    Show(ShowArgs),
    /// Stop serving an image. The image itself stays.
    #[command(after_help = "Example:\n  blockferry volume remove web-01")]
    Remove(NamedArgs),
}

#[derive(Debug, Subcommand)]
pub(super) enum PeerVerb {
    /// Let whichever instance of a peer comes next be the one.
    ///
    /// A person's decision: a peer whose state was copied or restored is turned away here, since two sites with
    /// one identity would write the same volumes. Stop the wrong one first.
    #[command(after_help = "Example:\n  blockferry peer accept site-b")]
    Accept(PeerArgs),
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreVerb {
    /// Show the store's size and how often it helped.
    #[command(after_help = "Example:\n  blockferry store stats --json")]
    Stats(ListArgs),
}

#[derive(Debug, Args)]
pub(super) struct VolumeAddArgs {
    /// The volume's name, which is the NBD export's.
    pub name: Name,
    /// A raw file or a block device at the daemon's site.
    #[arg(long, value_name = "PATH")]
    pub image: PathBuf,
    /// Take the name back although it left for another site, which may be serving it still.
    #[arg(long)]
    pub again: bool,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The volume.
    pub name: Name,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct NamedArgs {
    /// The volume.
    pub name: Name,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct PeerArgs {
    /// The peer, by its name in the daemon's configuration.
    pub name: Name,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    /// The volume.
    pub name: Name,
    /// Give it up although a guest wrote here; what it wrote is lost.
    #[arg(long)]
    pub discard_writes: bool,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct ReclaimArgs {
    /// The volume.
    pub name: Name,
    /// The epoch that the volume's status shows.
    #[arg(long, value_name = "N")]
    pub epoch: u64,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct LimitArgs {
    /// The volume.
    pub name: Name,
    /// The most that its bulk copy may take, such as 20Mbit/s, or unlimited.
    #[arg(value_name = "RATE")]
    pub rate: RateLimit,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct RelocateArgs {
    /// The volumes to bring here.
    #[arg(value_name = "PEER/NAME", required_unless_present = "fleet", conflicts_with = "fleet")]
    pub remotes: Vec<Remote>,
    /// Relocate the volumes that this file lists.
    #[arg(long, value_name = "FILE")]
    pub fleet: Option<PathBuf>,
    /// The raw file to make, or the block device to fill, if a single volume is relocated [default: volumes/NAME.raw in
    /// the daemon's state directory].
    #[arg(long, value_name = "PATH", conflicts_with = "fleet")]
    pub image: Option<PathBuf>,
    /// Fetch only what is read; copy nothing meanwhile.
    #[arg(long = "no-bulk", action = ArgAction::SetFalse)]
    pub bulk: bool,
    /// The most that the bulk copy of each volume may take.
    #[arg(long, value_name = "RATE", conflicts_with = "bulk")]
    pub bulk_rate: Option<RateLimit>,
    /// Take it although clients are connected at the source: their writes fail from then on.
    #[arg(long)]
    pub take: bool,
    /// Write onto a device although it holds something, such as a file system; all of it is lost.
    #[arg(long)]
    pub overwrite: bool,
    /// How long the hand-over of ownership may take; then it is withdrawn: the volume stays, or becomes again, its
    /// source's [default: 5min].
    #[arg(long, value_name = "SPAN", value_parser = parse_timeout)]
    pub timeout: Option<Span>,
    /// Follow each relocation until all of it is here, or it has failed, however long that takes; exit 1 if one failed.
    #[arg(long)]
    pub wait: bool,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// A volume, to see all about it [default: the whole site].
    pub name: Option<Name>,
    /// Show it again and again, until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// How often --watch looks.
    #[arg(long, value_name = "DURATION", default_value = "1s", requires = "watch")]
    pub interval: Span,
    /// Report as JSON (with --watch: one line each time).
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct PrewarmArgs {
    /// Raw files or block devices at the daemon's site.
    #[arg(long = "image", value_name = "PATH", required = true, num_args = 1..)]
    pub images: Vec<PathBuf>,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

#[derive(Debug, Args)]
pub(super) struct AnalyzeArgs {
    /// The images that would be relocated.
    #[arg(value_name = "IMAGE", required = true)]
    pub images: Vec<PathBuf>,
    /// Images that the destination's store would have been filled from.
    #[arg(long, value_name = "IMAGE", num_args = 1..)]
    pub prewarmed: Vec<PathBuf>,
    /// The link to predict times for, such as 100Mbit/s.
    #[arg(long, value_name = "RATE", requires = "rtt")]
    pub link: Option<Rate>,
    /// The link's round trip, such as 40ms; a plain number is milliseconds.
    #[arg(long, value_name = "MS", requires = "link", value_parser = parse_rtt)]
    pub rtt: Option<RoundTripMs>,
    /// Block sizes to compare [default: 16KiB to 256KiB].
    #[arg(long = "block-size", value_name = "SIZE", value_delimiter = ',', value_parser = parse_block_size)]
    pub block_sizes: Vec<BlockSize>,
    /// The zstd level.
    #[arg(long, value_name = "LEVEL", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub level: i32,
    /// Worker threads [default: one for each processor].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub threads: usize,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// A round trip in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RoundTripMs(pub f64);

fn parse_rtt(text: &str) -> Result<RoundTripMs, String> {
    match text.parse::<f64>() {
        Ok(ms) if ms.is_finite() && ms >= 0.0 => Ok(RoundTripMs(ms)),
        Ok(_) => Err("a round trip takes 0 ms or more".to_owned()),
        Err(_) => match text.parse() {
            Ok(Span(duration)) => Ok(RoundTripMs(duration.as_secs_f64() * 1000.0)),
            Err(error) => Err(error.to_string()),
        },
    }
}

fn parse_timeout(text: &str) -> Result<Span, String> {
    match text.parse() {
        Ok(Span(duration)) if duration.is_zero() => Err("nothing can be handed over in no time".to_owned()),
        Ok(span) => Ok(span),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_block_size(text: &str) -> Result<BlockSize, String> {
    let ByteSize(bytes) = text.parse().map_err(|error: crate::units::UnitError| error.to_string())?;
    BlockSize::new(bytes).map_err(|error| error.to_string())
}
