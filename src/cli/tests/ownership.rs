//! Tests of the verbs and reports that speak of ownership: cancel, reclaim, names that left, what is owed.

use super::*;
use crate::control::{Left, Owed, OwedOfVolume, ReclaimAnswer};

#[test]
fn cancelling_says_what_is_thrown_away() {
    let bench = Bench::new();
    let said = "db-01: relocation given up; site-b owns it now\n  thrown away: nothing\n";
    assert_eq!(bench.out(&["cancel", "db-01"]), said);
    assert_eq!(bench.daemon.calls().last().map(String::as_str), Some("cancel db-01"));

    let mut precious = volume("precious", Role::Destination, Phase::Copying);
    precious.guest_written_bytes = 3 << 16;
    bench.daemon.site.volumes.lock().insert(name("precious"), precious);
    let ran = bench.run(&["cancel", "precious"]);
    assert_eq!(ran.status, 1);
    let refusal = "blockferry: cancelling precious would lose 3 blocks that its guest wrote; let it complete\n";
    assert_eq!(ran.err, refusal);
    let said = "precious: relocation given up; site-b owns it now\n  \
                thrown away: 196608 bytes (192 KiB) that its guest wrote here\n";
    assert_eq!(bench.out(&["cancel", "precious", "--discard-writes"]), said);
    assert_eq!(bench.daemon.calls().last().map(String::as_str), Some("cancel discarding precious"));
    let json = bench.json(&["cancel", "precious", "--discard-writes"]);
    assert_eq!((&json["discarded_bytes"], &json["owner"]), (&(3 << 16).into(), &"site-b".into()));

    // A daemon of an earlier version answers nothing.
    assert_eq!(show::cancelled(&name("x"), None), "x: relocation given up\n");
}

#[test]
fn reclaiming_says_what_is_lost_and_who_is_fenced() {
    let bench = Bench::new();
    let out = bench.out(&["reclaim", "db-01", "--epoch", "3"]);
    assert_fits_80_columns(&out);
    let said = "db-01: reclaimed; this site owns it now, epoch 4\n  \
                lost     4096 blocks that never arrived read as errors.\n  \
                in all   268435456 bytes (256 MiB)\n  \
                fenced   site-b: should it come back, it serves db-01 no more and says why\n";
    assert_eq!(out, said);
    assert_eq!(bench.daemon.calls().last().map(String::as_str), Some("reclaim 3 db-01"));
    let json = bench.json(&["reclaim", "db-01", "--epoch", "4"]);
    assert_eq!(
        (&json["epoch"], &json["fenced"], &json["lost_bytes"]),
        (&5.into(), &"site-b".into(), &(1 << 28).into())
    );
    assert_eq!(json["lost"].as_array().map(Vec::len), Some(1));

    let ran = bench.run(&["reclaim", "db-01", "--epoch", "3"]);
    assert_eq!((ran.status, ran.out.as_str()), (1, ""));
    assert!(ran.err.contains("db-01 is in epoch 5, not 3"), "{}", ran.err);
    let ran = bench.run(&["reclaim", "db-01"]);
    assert!(ran.status == 2 && ran.err.contains("--epoch <N>"), "{ran:?}");

    let unknown =
        ReclaimAnswer { epoch: 2, is_owner: true, lost: vec!["All of it.".into()], lost_bytes: None, fenced: None };
    let never_here = ReclaimAnswer { is_owner: false, ..unknown.clone() };
    assert!(show::reclaimed(&name("x"), &never_here).contains("does not own it"));
    let text = show::reclaimed(&name("x"), &unknown);
    assert!(text.contains("  in all   nobody knows how much\n") && text.contains("  fenced   nobody\n"), "{text}");
    let nothing = ReclaimAnswer { lost: vec![], lost_bytes: Some(0), ..unknown };
    assert!(show::reclaimed(&name("x"), &nothing).contains("  lost     nothing\n"));
}

#[test]
fn the_help_of_reclaim_says_that_a_person_decides() {
    let help = run_alone(&["reclaim", "--help"]).out;
    let words: Vec<_> = help.split_whitespace().collect();
    let help = words.join(" ");
    for said in ["A person's decision", "the epoch that `blockferry status NAME` shows", "reclaim web-01 --epoch 3"] {
        assert!(help.contains(said), "{said:?} is not in {help}");
    }
}

#[test]
fn a_name_that_left_comes_back_only_when_told_so() {
    let bench = Bench::new();
    bench.daemon.site.left.lock().push(Left { name: name("x"), peer: name("site-b"), epoch: 2 });
    let ran = bench.run(&["volume", "add", "x", "--image", "/srv/x.raw"]);
    assert_eq!(ran.status, 1);
    assert!(ran.err.contains("x left this site for site-b in epoch 2; --again takes it back"), "{}", ran.err);
    bench.out(&["volume", "add", "x", "--image", "/srv/x.raw", "--again"]);
    assert_eq!(bench.daemon.calls().last().map(String::as_str), Some("add x /srv/x.raw again"));
}

#[test]
fn what_is_owed_and_what_left_is_shown() {
    let bench = Bench::new();
    let what = "that it may let go of its image, since all of it has arrived here and is checked";
    let volume_name = name("web-01");
    bench.daemon.site.owed.lock().push(OwedOfVolume {
        volume: volume_name.clone(),
        peer: name("site-b"),
        what: what.into(),
        since_epoch: 2,
    });
    bench.daemon.site.left.lock().push(Left { name: name("old-01"), peer: name("site-c"), epoch: 7 });
    if let Some(volume) = bench.daemon.site.volumes.lock().get_mut(&volume_name) {
        volume.owed = vec![Owed { peer: name("site-b"), what: what.into(), since_epoch: 2 }];
        volume.read_only = Some("the device is read-only".into());
    }
    let site = bench.out(&["status"]);
    assert_fits_80_columns(&site);
    assert!(site.contains("\nleft old-01: to site-c in epoch 7\n"), "{site}");
    let told = format!("site-b is yet to be told: {what} (since epoch 2)");
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words(&site).contains(&format!("owed web-01: {told}")), "{site}");
    let one = bench.out(&["status", "web-01"]);
    assert_fits_80_columns(&one);
    assert!(words(&one).contains(&told), "{one}");
    assert!(one.contains("\n           guests may only read it: the device is read-only\n"), "{one}");
    let other = bench.out(&["status", "db-01"]);
    assert!(other.contains("\n           18.0 MiB that only this site has, written by guests\n"), "{other}");

    let json = bench.json(&["status"]);
    assert_eq!((&json["owed"][0]["volume"], &json["owed"][0]["since_epoch"]), (&"web-01".into(), &2.into()));
    assert_eq!((&json["left"][0]["peer"], &json["left"][0]["epoch"]), (&"site-c".into(), &7.into()));
    let json = bench.json(&["status", "web-01"]);
    assert_eq!((&json["owed"][0]["peer"], &json["read_only"]), (&"site-b".into(), &"the device is read-only".into()));
    assert_eq!(bench.json(&["status", "db-01"])["guest_written_bytes"], 18 << 20);
}

#[test]
fn fenced_volumes_and_those_being_given_back_fit_the_table() {
    let mut fenced = volume("web-01", Role::Source, Phase::Fenced);
    fenced.phase_reason = "site-b reclaimed it in epoch 4".into();
    let returning = volume("db-01", Role::Destination, Phase::GivingBack);
    let text = show::volumes(&[fenced, returning]);
    assert_fits_80_columns(&text);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[1].starts_with("web-01 fenced      75%"), "{text}");
    assert!(lines[2].contains("site-b reclaimed it in epoch 4"), "{text}");
    assert!(lines[3].starts_with("db-01  returning   75%"), "{text}");
}

#[test]
fn a_status_of_an_earlier_daemon_is_read() {
    let mut value = serde_json::to_value(volume("x", Role::Source, Phase::Owned)).expect("JSON");
    let fields = value.as_object_mut().expect("an object");
    for new in ["read_only", "guest_written_bytes", "owed"] {
        assert!(fields.remove(new).is_some(), "{new}");
    }
    let read: crate::control::VolumeStatus = serde_json::from_value(value).expect("it is read");
    assert_eq!((read.read_only, read.guest_written_bytes, read.owed), (None, 0, vec![]));
    for (phase, text) in [(Phase::Fenced, "fenced"), (Phase::GivingBack, "giving_back")] {
        assert_eq!((serde_json::to_value(phase).expect("JSON"), phase.as_str()), (text.into(), text));
    }
}
