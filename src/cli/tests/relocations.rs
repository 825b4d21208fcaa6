//! Tests of `relocate`: its answers, its waiting, its fleets.

use super::*;
use crate::cli::verdict::{Until, Wait};

#[test]
fn relocations_begin() {
    let bench = Bench::new();
    let image = "/srv/new-1.raw";
    let out = bench.out(&["relocate", "site-b/new-1", "--image", image, "--no-bulk"]);
    assert_eq!(out, "new-1: served here, and on its way from site-b\n");
    let call = bench.daemon.calls()[0].clone();
    assert!(call.contains("bulk: false") && call.contains(image), "{call}");

    let ran = bench.run(&["relocate", "site-b/new-2", "nobody/new-3", "--bulk-rate", "8Mbit/s"]);
    assert_eq!((ran.status, ran.out.as_str()), (1, "new-2: served here, and on its way from site-b\n"));
    assert!(ran.err.contains("nobody/new-3: there is no peer nobody; list it"), "{}", ran.err);
    assert!(ran.err.contains("1 of 2 relocations failed"), "{}", ran.err);
    let call = bench.daemon.calls()[1].clone();
    assert!(call.contains("bulk: true") && call.contains("bulk_rate_bytes_per_s: Some(1000000)"), "{call}");

    let ran = bench.run(&["relocate", "site-b/db-01"]);
    let refusal = "blockferry: site-b/db-01: there is a volume db-01 already; cancel or remove that one first\n";
    assert_eq!((ran.status, ran.err.as_str()), (1, refusal));

    let json = bench.json(&["relocate", "site-b/new-4"]);
    assert_eq!(json["relocations"][0]["volume"], "new-4");
    assert!(json["relocations"][0]["error"].is_null() && json["relocations"][0]["status"].is_null());
}

#[test]
fn what_a_relocation_may_do_is_said_to_the_site() {
    let bench = Bench::new();
    bench.out(&["relocate", "site-b/new-1"]);
    assert!(bench.daemon.calls()[0].contains("take: false, overwrite: false, timeout_s: None"));
    bench.out(&["relocate", "site-b/new-2", "--take", "--overwrite", "--timeout", "1m 30s"]);
    assert!(bench.daemon.calls()[1].contains("take: true, overwrite: true, timeout_s: Some(90.0)"));
}

#[test]
fn a_hand_over_that_takes_its_time_is_waited_for() {
    let bench = Bench::new();
    let ran = bench.run(&["relocate", "site-b/late-1"]);
    assert_eq!((ran.status, ran.out.as_str()), (0, "late-1: served here, and on its way from site-b\n"), "{ran:?}");
    let progress = "connecting  zero 40% store 33% wire 27%  site-b is writing back its cache before the hand-over\n";
    assert!(ran.err.ends_with(progress) && ran.err.lines().count() == 1, "{}", ran.err);

    let json = bench.json(&["relocate", "site-b/late-2"]);
    assert!(json["relocations"][0]["error"].is_null() && json["relocations"][0]["status"].is_null(), "{json}");
}

#[test]
fn a_hand_over_that_is_withdrawn_ends_with_the_site_s_reason() {
    let bench = Bench::new();
    let reason = "the hand-over of withdrawn-1 was withdrawn: it took more than 5m; relocate it again\n";
    let ran = bench.run(&["relocate", "site-b/withdrawn-1"]);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""), "{ran:?}");
    assert!(ran.err.ends_with(&format!("\nblockferry: site-b/withdrawn-1: {reason}")), "{}", ran.err);

    let ran = bench.run(&["relocate", "site-b/withdrawn-2", "site-b/new-1", "--wait", "--json"]);
    assert_eq!(ran.status, 1, "{ran:?}");
    let report: Value = serde_json::from_str(&ran.out).expect("JSON");
    assert_eq!(report["relocations"][0]["error"]["kind"], "conflict");
    assert_eq!(report["relocations"][1]["status"]["phase"], "released_from_source");
}

#[test]
fn a_hand_over_that_outlasts_its_time_may_still_come_about() {
    let bench = Bench::new();
    let began = std::time::Instant::now();
    let ran = bench.run(&["relocate", "site-b/stuck-1", "--timeout", "20ms"]);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""), "{ran:?}");
    assert!(began.elapsed() >= Duration::from_millis(20));
    let said = "site-b/stuck-1: the hand-over of stuck-1 is not settled after 0s, and may still come about: site-b is \
                writing back its cache before the hand-over; `blockferry status stuck-1`";
    assert!(ran.err.contains(said) && !ran.err.contains("failed"), "{}", ran.err);
}

#[test]
fn a_request_that_outlasts_its_time_has_begun() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let daemon = runtime.block_on(async { FakeDaemon::answering_within(Duration::from_millis(300)) });
    let (_closed, gate) = tokio::sync::oneshot::channel();
    *daemon.site.change_gate.lock() = Some(gate);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let pace = Pace { quiet: Duration::from_millis(1), ..QUICK };
    let mut console =
        Console { out: &mut out, err: &mut err, watched: false, redraws: false, pace, variables: Vec::new() };
    let socket = daemon.socket();
    let socket = socket.to_str().expect("text");
    let arguments = ["blockferry", "relocate", "site-b/late-1", "--socket", socket];
    let status = run(arguments.iter().map(OsString::from), &mut console);
    let (out, err) = (String::from_utf8(out).expect("text"), String::from_utf8(err).expect("text"));
    assert_eq!((status, out.as_str()), (0, "late-1: served here, and on its way from site-b\n"), "{err}");
    let lines: Vec<_> = err.lines().collect();
    assert!(lines[0].contains("connecting") && lines[0].contains("writing back its cache"), "{err}");
    assert!(lines.last().is_some_and(|line| line.contains("POST /v1/relocations is still under way")), "{err}");
}

#[test]
fn relocations_are_waited_for() {
    let bench = Bench::new();
    let ran = bench.run(&["relocate", "site-b/new-1", "site-b/new-2", "--wait"]);
    assert_eq!(ran.status, 0, "{ran:?}");
    let said = "new-1: 1.0 GiB here: zero 40% store 33% wire 27%; 90.0 MiB over the wire";
    assert_eq!(ran.out.lines().next(), Some(said));
    let progress = "new-1  50%  88.0 Mbit/s  zero 40% store 33% wire 27%  1m 0s left";
    assert!(ran.err.lines().any(|line| line == progress), "{}", ran.err);
    assert!(ran.err.lines().any(|line| line.starts_with("new-2  100%  done")), "{}", ran.err);
    assert_fits_80_columns(&ran.err);

    let ran = bench.run(&["relocate", "site-b/new-3", "site-b/bad-1", "--wait", "--json"]);
    assert_eq!(ran.status, 1, "{ran:?}");
    let report: Value = serde_json::from_str(&ran.out).expect("JSON");
    assert_eq!(report["relocations"][0]["status"]["phase"], "released_from_source");
    assert_eq!(report["relocations"][1]["status"]["phase"], "failed");
    assert_eq!(report["relocations"][1]["error"]["message"], "bad-1 failed: the disk is full");
    assert!(ran.err.contains("site-b/bad-1: bad-1 failed: the disk is full"), "{}", ran.err);
}

#[test]
fn a_fleet_is_relocated_from_a_file() {
    let bench = Bench::new();
    let fleet = bench.daemon.dir.path().join("fleet.txt");
    std::fs::write(&fleet, "# two\nsite-b/new-1\nsite-b/new-2 two.raw\n").expect("written");
    let fleet_text = fleet.to_str().expect("text");
    let out = bench.out(&["relocate", "--fleet", fleet_text]);
    assert_eq!(out.lines().count(), 2);
    let calls = bench.daemon.calls();
    let image = bench.daemon.dir.path().join("two.raw");
    assert!(calls[0].contains("image: None") && calls[1].contains(&image.display().to_string()), "{calls:?}");

    std::fs::write(&fleet, "site-b/new-1\nsite-b new-2\n").expect("written");
    let ran = bench.run(&["relocate", "--fleet", fleet_text]);
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("fleet.txt:2: \"site-b\" is not PEER/NAME"), "{}", ran.err);
}

#[test]
fn a_volume_that_vanishes_while_it_is_waited_for_is_a_failure() {
    let bench = Bench::new();
    let client = bench.daemon.client();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut console =
        Console { out: &mut out, err: &mut err, watched: false, redraws: false, pace: QUICK, variables: Vec::new() };
    let wait = Wait { until: Until::Arrived, handover: Duration::from_secs(5), unknown: Duration::ZERO };
    let names = [name("none")];
    let following = follow::relocations(&client, &names, wait, &mut console);
    let outcomes = runtime.block_on(following).expect("followed");
    let [follow::Outcome { status: None, error: Some(error) }] = &outcomes[..] else { panic!("not one failure") };
    assert_eq!(error.to_string(), "there is no volume none; `blockferry status` lists them");
}
