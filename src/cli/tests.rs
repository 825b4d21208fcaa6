//! Tests of the command line, verb by verb, against a daemon whose site exists only in memory.

mod init;
mod ownership;
mod relocations;

use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory;
use serde_json::Value;
use tokio::runtime::Runtime;

use super::*;
use crate::control::fake::{FakeDaemon, name, volume};
use crate::control::{Phase, Role};

/// A daemon and the means to run verbs against it.
struct Bench {
    /// Serves the daemon's socket meanwhile.
    _runtime: Runtime,
    daemon: FakeDaemon,
}

/// What came of a verb.
#[derive(Debug)]
struct Ran {
    status: u8,
    out: String,
    err: String,
}

const QUICK: Pace = Pace {
    poll: Duration::from_millis(1),
    line: Duration::ZERO,
    absence: Duration::ZERO,
    quiet: Duration::from_secs(5),
    slack: Duration::ZERO,
};

fn run_with(arguments: &[&str], variables: &[(&str, &str)], out: &mut dyn Write) -> (u8, String) {
    let mut err = Vec::new();
    let mut console = Console {
        out,
        err: &mut err,
        watched: false,
        redraws: false,
        pace: QUICK,
        variables: variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    };
    let arguments = ["blockferry"].iter().chain(arguments).map(OsString::from);
    let status = run(arguments, &mut console);
    (status, String::from_utf8(err).expect("text"))
}

fn run_alone(arguments: &[&str]) -> Ran {
    let mut out = Vec::new();
    let (status, err) = run_with(arguments, &[], &mut out);
    Ran { status, out: String::from_utf8(out).expect("text"), err }
}

impl Bench {
    fn new() -> Bench {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let daemon = runtime.block_on(async { FakeDaemon::start() });
        Bench { _runtime: runtime, daemon }
    }

    /// Runs a verb with this daemon's socket.
    fn run(&self, arguments: &[&str]) -> Ran {
        let socket = self.daemon.socket();
        let socket = socket.to_str().expect("text");
        run_alone(&[arguments, &["--socket", socket]].concat())
    }

    /// The same, and it must succeed.
    fn out(&self, arguments: &[&str]) -> String {
        let ran = self.run(arguments);
        assert_eq!(ran.status, 0, "{arguments:?}: {ran:?}");
        ran.out
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.out(&[arguments, &["--json"]].concat())).expect("JSON")
    }
}

fn assert_fits_80_columns(text: &str) {
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
    }
}

#[test]
fn the_grammar_is_sound_and_every_verb_has_an_example() {
    fn check(command: &clap::Command, path: &str) {
        for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
            let path = format!("{path} {}", verb.get_name());
            let help = verb.clone().render_long_help().to_string();
            assert!(help.contains("Example") && help.contains("blockferry "), "{path} has no example");
            check(verb, &path);
        }
    }
    let mut command = Cli::command();
    command.clone().debug_assert();
    command.build();
    check(&command, "blockferry");
}

#[test]
fn usage_is_status_2_and_help_is_0() {
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["relocate", "--help"],
        &["volume", "add", "--help"],
        &["store", "stats", "--help"],
    ] {
        let ran = run_alone(arguments);
        assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{arguments:?}");
        assert!(ran.out.contains("blockferry"), "{}", ran.out);
    }
    for (arguments, words) in [
        (&[][..], "Usage: blockferry"),
        (&["handover", "x"], "unrecognized subcommand 'handover'"),
        (&["stats"], "unrecognized subcommand"),
        (&["volume", "add", "a b", "--image", "/x"], "is not a usable name"),
        (&["volume", "add", "a"], "--image <PATH>"),
        (&["relocate"], "PEER/NAME"),
        (&["relocate", "site-b"], "is not PEER/NAME, such as site-b/web-01"),
        (&["relocate", "site-b/x", "--fleet", "f"], "cannot be used with"),
        (&["relocate", "site-b/x", "--bulk-rate", "100"], "is not a rate limit"),
        (&["relocate", "site-b/x", "--bulk-rate", "8Mbit/s", "--no-bulk"], "cannot be used with"),
        (&["relocate", "site-b/x", "site-b/y", "--image", "/z", "--socket", "/s"], "--image names one file"),
        (&["relocate", "site-b/x", "site-c/x", "--socket", "/s"], "x would be relocated twice"),
        (&["relocate", "--fleet", "/nonexistent", "--socket", "/s"], "cannot read the fleet file /nonexistent"),
        (&["relocate", "site-b/x", "--timeout", "0s"], "nothing can be handed over in no time"),
        (&["relocate", "site-b/x", "--timeout", "5"], "5"),
        (&["reclaim", "x", "--epoch=-1"], "--epoch"),
        (&["limit", "x", "0MB/s"], "nothing would ever move"),
        (&["status", "--interval", "1s"], "--watch"),
        (&["prewarm"], "--image"),
        (&["analyze"], "<IMAGE>"),
        (&["analyze", "x", "--link", "1Gbit/s"], "--rtt"),
        (&["analyze", "x", "--block-size", "96KiB"], "must be a power of two"),
        (&["analyze", "x", "--link", "1Gbit/s", "--rtt=-1"], "0 ms or more"),
        (&["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml: cannot read the configuration"),
        (&["status", "--config", "/nonexistent.toml"], "/nonexistent.toml: cannot read the configuration"),
    ] {
        let ran = run_alone(arguments);
        assert_eq!((ran.status, ran.out.as_str()), (2, ""), "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(words), "{arguments:?}: {}", ran.err);
    }
}

#[test]
fn without_a_daemon_one_line_says_so() {
    let ran = run_alone(&["status", "--socket", "/nonexistent/control.sock"]);
    assert_eq!(ran.status, 1);
    assert!(ran.err.starts_with("blockferry: no daemon answers at /nonexistent/control.sock"), "{}", ran.err);
    assert!(ran.err.contains("`blockferry serve`"), "{}", ran.err);
    assert_eq!(ran.err.lines().count(), 1);
}

#[test]
fn the_daemon_is_found_by_state_and_by_configuration() {
    let bench = Bench::new();
    let state = bench.daemon.dir.path();
    let state_text = state.to_str().expect("text");
    assert_eq!(run_alone(&["volume", "list", "--state", state_text]).status, 0);

    let config = state.join("elsewhere.toml");
    let text = format!("[site]\nname = \"a\"\nstate_dir = \"{state_text}\"\n[control]\nsocket = \"control.sock\"\n");
    std::fs::write(&config, &text).expect("written");
    let config_text = config.to_str().expect("text");
    assert_eq!(run_alone(&["volume", "list", "--config", config_text]).status, 0);

    // The configuration in the state directory is the one that counts there.
    std::fs::write(state.join("blockferry.toml"), text.replace("control.sock", "other.sock")).expect("written");
    let ran = run_alone(&["volume", "list", "--state", state_text]);
    assert!(ran.status == 1 && ran.err.contains("other.sock"), "{ran:?}");
    let socket = bench.daemon.socket();
    let overridden = [("BLOCKFERRY_CONTROL_SOCKET", socket.to_str().expect("text"))];
    assert_eq!(run_with(&["volume", "list", "--state", state_text], &overridden, &mut Vec::new()).0, 0);
}

#[test]
fn volumes() {
    let bench = Bench::new();
    let out = bench.out(&["volume", "add", "x", "--image", "/srv/x.raw"]);
    assert_eq!(out, "x: /srv/x.raw is served by NBD\n");
    bench.out(&["volume", "add", "y", "--image", "y.raw"]);
    let here = std::env::current_dir().expect("a directory").join("y.raw");
    assert_eq!(bench.daemon.calls()[1], format!("add y {}", here.display()));
    assert_eq!(bench.json(&["volume", "add", "z", "--image", "/srv/z.raw"])["image"], "/srv/z.raw");

    let list = bench.out(&["volume", "list"]);
    assert_fits_80_columns(&list);
    let lines: Vec<_> = list.lines().collect();
    assert_eq!(lines[0], "VOLUME PHASE      DONE     SIZE     ZERO    STORE     WIRE    LEFT");
    assert_eq!(lines[1], "db-01  copying     75%  1.0 GiB  300 MiB  250 MiB 90.0 MiB   2m 5s");
    assert_eq!(lines[2], "web-01 owned       75%  1.0 GiB        -        -        -       -");
    assert_eq!(bench.json(&["volume", "list"]).as_array().map(Vec::len), Some(5));
    assert_eq!(bench.json(&["volume", "show", "web-01"])["phase"], "owned");

    assert_eq!(bench.out(&["volume", "remove", "x"]), "x: no longer served; its image stays\n");
    let ran = bench.run(&["volume", "show", "x"]);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""));
    assert_eq!(ran.err, "blockferry: there is no volume x; `blockferry status` lists them\n");
    let ran = bench.run(&["volume", "add", "db-01", "--image", "/x"]);
    assert_eq!((ran.status, ran.err.contains("a volume db-01 already")), (1, true), "{ran:?}");
}

#[test]
fn an_empty_site_says_what_to_do() {
    let bench = Bench::new();
    bench.daemon.site.volumes.lock().clear();
    assert!(bench.out(&["volume", "list"]).starts_with("no volumes yet"));
}

#[test]
fn a_volume_is_shown_in_full() {
    let bench = Bench::new();
    let out = bench.out(&["volume", "show", "db-01"]);
    assert_fits_80_columns(&out);
    for line in [
        "db-01: copying, 75% of 1.0 GiB here, 2m 5s left",
        "  owner    site-a, epoch 3; this site is the destination, from site-b",
        "  image    /srv/db-01.raw",
        "  blocks   16384 of 64.0 KiB",
        "           4096 absent, 12000 present, 288 written, 2 written in part",
        "  reads    5.0 MiB resident, 1.0 MiB zero, 2.0 MiB store, 3.0 MiB wire",
        "           4.0 KiB from blocks written in part",
        "  moved    300 MiB zero, 200 MiB store, 50.0 MiB shared, 200 MiB by wire",
        "  wire     90.0 MiB sent: 10.0 MiB demand, 80.0 MiB bulk",
        "           110 MiB saved by compression",
        "  demand   120 reads waited: p50 45.5 ms, p99 61.2 ms, longest 99.0 ms",
        "  bulk     running, 88.0 Mbit/s, at most 100 Mbit/s",
        "  link     connected, round trip 40.2 ms, window 605 KiB",
        "  clients  1",
    ] {
        assert!(out.lines().any(|shown| shown == line), "{line:?} is not in\n{out}");
    }
    assert!(bench.out(&["status", "web-01"]).contains("  hashed   8192 of 16384\n"));
}

#[test]
fn the_site_is_shown_at_a_glance() {
    let bench = Bench::new();
    let out = bench.out(&["status"]);
    assert_fits_80_columns(&out);
    assert!(out.starts_with("site site-a, up 1h 2m, version 0.1.0\nfingerprint\n  sha256:abab"), "{out}");
    assert!(out.contains("\npeer site-b: connected, round trip 40.2 ms\n"), "{out}");
    assert!(out.contains("\npeer site-c: down, no answer from site-c.example:7440\n"), "{out}");
    assert!(out.contains("\ndb-01  copying"), "{out}");
    let json = bench.json(&["status"]);
    assert_eq!(json["volumes"][0]["moved"]["wire_by_class"]["bulk_bytes"], 80 << 20);
    assert_eq!(json["peers"][1]["state"], "down");
    assert!(json["store"].is_object());
}

#[test]
fn long_names_and_reasons_fit_the_terminal() {
    let reason = "cannot reach site-b: no answer from 192.0.2.1:7440 within 10 s: is blockferry running there, does a \
                  firewall drop UDP? Größe: ünverändert";
    let bench = Bench::new();
    for volume in bench.daemon.site.volumes.lock().values_mut() {
        volume.phase_reason = reason.into();
        volume.owner = name(&"o".repeat(60));
        volume.peer = Some(name(&"p".repeat(60)));
    }
    for arguments in [&["status"][..], &["volume", "list"], &["status", "db-01"], &["volume", "show", "web-01"]] {
        let out = bench.out(arguments);
        assert_fits_80_columns(&out);
        // Nothing is lost but line ends.
        let words: Vec<_> = out.split_whitespace().collect();
        assert!(words.join(" ").contains(reason), "{out}");
    }
    let mut long = volume("x", Role::Destination, Phase::Copying);
    long.image = format!("/srv/{}.raw", "y".repeat(100)).into();
    let image = long.image.display().to_string();
    assert!(show::volume(&long).lines().any(|line| line.ends_with(&image)), "a path is not broken");
}

/// Takes some writes, then breaks like a closed pipe.
struct Pipe {
    taken: Vec<u8>,
    looks: usize,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.taken.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.looks = self.looks.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(())
    }
}

#[test]
fn watching_goes_on_until_nobody_reads() {
    let bench = Bench::new();
    let socket = bench.daemon.socket();
    let socket = socket.to_str().expect("text");
    let mut pipe = Pipe { taken: Vec::new(), looks: 3 };
    let arguments = ["status", "--watch", "--interval", "1ms", "--json", "--socket", socket];
    let (status, err) = run_with(&arguments, &[], &mut pipe);
    assert_eq!((status, err.as_str()), (0, ""));
    let text = String::from_utf8(pipe.taken).expect("text");
    let looks: Vec<Value> =
        text.lines().filter(|line| !line.is_empty()).map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(looks.len(), 4);

    let ran = bench.run(&["status", "none", "--watch"]);
    assert!(ran.status == 1 && ran.err.contains("no volume none"), "{ran:?}");
}

#[test]
fn orders() {
    let bench = Bench::new();
    for (arguments, said, call) in [
        (&["pause", "db-01"][..], "db-01: bulk copy paused\n", "pause db-01"),
        (&["resume", "db-01"], "db-01: bulk copy goes on\n", "resume db-01"),
        (&["limit", "db-01", "20Mbit/s"], "db-01: bulk limit is 20Mbit/s\n", "limit Some(2500000) db-01"),
        (&["limit", "db-01", "unlimited"], "db-01: bulk limit is unlimited\n", "limit None db-01"),
    ] {
        assert_eq!(bench.out(arguments), said);
        assert_eq!(bench.daemon.calls().last().map(String::as_str), Some(call));
    }
}

#[test]
fn somebody_who_watches_gets_bars_instead_of_lines() {
    let bench = Bench::new();
    let socket = bench.daemon.socket();
    let mut err = Vec::new();
    for arguments in [&["relocate", "site-b/new-1", "--wait"][..], &["prewarm", "--image", "/srv/t.raw"]] {
        let mut console = Console {
            out: &mut Vec::new(),
            err: &mut err,
            watched: true,
            redraws: true,
            pace: QUICK,
            variables: Vec::new(),
        };
        let arguments = ["blockferry"].iter().chain(arguments).map(OsString::from);
        let socket = ["--socket".into(), socket.clone().into_os_string()];
        assert_eq!(run(arguments.chain(socket), &mut console), 0);
    }
    assert_eq!(String::from_utf8_lossy(&err), "");
}

#[test]
fn prewarming() {
    let bench = Bench::new();
    let ran = bench.run(&["prewarm", "--image", "/srv/t.raw", "/srv/u.raw"]);
    assert_eq!(ran.status, 0, "{ran:?}");
    assert_eq!(ran.out, "2 images, 1.0 GiB: 7000 blocks new, 1000 known, 8384 zero\n");
    assert!(ran.err.starts_with("prewarm  50%  2 images, 512 MiB"), "{}", ran.err);
    assert_eq!(bench.daemon.calls()[0], "prewarm [\"/srv/t.raw\", \"/srv/u.raw\"]");
    let json = bench.json(&["prewarm", "--image", "/srv/t.raw"]);
    assert_eq!((&json["job"], &json["blocks_new"], &json["done"]), (&2.into(), &7000.into(), &true.into()));
    let ran = bench.run(&["prewarm", "--image", "/srv/broken.raw"]);
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("prewarming ended early: /srv/broken.raw cannot be read"), "{}", ran.err);
}

#[test]
fn store_stats() {
    let bench = Bench::new();
    assert_eq!(bench.json(&["store", "stats"])["hits"], 300);
    let out = bench.out(&["store", "stats"]);
    assert_fits_80_columns(&out);
    for line in [
        "size      3.0 GiB of 12.0 GiB (25%)",
        "blocks    about 20000",
        "hit rate  75% of 400 look-ups",
        "hits      300 blocks, 18.8 MiB",
        "puts      1000 blocks, 62.5 MiB, compressed to 25.0 MiB (40%)",
    ] {
        assert!(out.lines().any(|shown| shown == line), "{line:?} is not in\n{out}");
    }
    assert!(show::store(&Default::default()).contains("hit rate  - of 0 look-ups"));
}

#[test]
fn tables_bear_odd_volumes() {
    let mut odd = volume(&"x".repeat(128), Role::Destination, Phase::Stalled);
    odd.phase_reason = "waiting for the link to site-b".into();
    odd.blocks = Default::default();
    odd.moved = Default::default();
    odd.eta_s = Some(1e12);
    let text = show::volumes(&[odd.clone()]);
    assert_eq!(text.lines().nth(1).map(|line| line.starts_with("xxxxxxxxxxxxxxxxxxx… stalled    100%")), Some(true));
    assert!(text.contains("waiting for the link"), "{text}");
    assert!(show::volume(&odd).contains("  moved    none\n"));
    assert_eq!(show::shares(&odd), "");
    odd.blocks.total = u64::MAX;
    odd.blocks.absent = 1;
    assert_eq!(show::percent_done(&odd), 99);
}

#[test]
fn analyze_needs_no_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("a.raw");
    std::fs::write(&image, vec![7u8; 1 << 20]).expect("written");
    let image = image.to_str().expect("text");
    let ran =
        run_alone(&["analyze", image, "--block-size", "64KiB", "--link", "100Mbit/s", "--rtt", "40", "--threads", "1"]);
    assert_eq!(ran.status, 0, "{ran:?}");
    assert_fits_80_columns(&ran.out);
    let ran = run_alone(&["analyze", image, "--json", "--threads", "1"]);
    assert!(serde_json::from_str::<Value>(&ran.out).expect("JSON").is_object());
    let ran = run_alone(&["analyze", "/nonexistent.raw"]);
    assert!(ran.status == 1 && ran.err.contains("/nonexistent.raw"), "{ran:?}");
}
