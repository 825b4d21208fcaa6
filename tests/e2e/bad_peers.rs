//! Peers, names and configurations that are wrong: each a clear error that names the thing, and nothing lost.

use crate::disk::{BLOCK, Disk, assert_same};
use crate::site::{Pair, Site, link, text};

const NOBODY: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000ff";

#[test]
fn names_that_mean_nothing_are_named() {
    let pair = Pair::with(link(200, 4), |a, b| {
        a.peers[0].volumes = &["vm", "later"];
        let mut mute = a.peer(None, &[]);
        mute.name = "mute";
        mute.fingerprint = NOBODY.to_owned();
        b.peers.push(mute);
    });
    let disk = Disk::mixed(80, 20, 512);
    pair.add("vm", &disk);
    pair.add("secret", &disk.sibling(81, 3));
    let place = pair.path("new.raw");
    let refused = |remote: &str, names: &[&str]| {
        let said = pair.b.refused(&["relocate", remote, "--image", text(&place)], names);
        assert!(!place.exists(), "relocate {remote} left its file behind");
        said
    };
    refused("nobody/vm", &["vm", "nobody"]);
    refused("mute/vm", &["vm", "mute", "address"]);
    let unknown = refused("a/ghost", &["ghost", " a"]);
    // Whoever was not granted a volume cannot even tell that it exists.
    let not_granted = refused("a/secret", &["secret", " a"]);
    assert_eq!(unknown.replace("ghost", "NAME"), not_granted.replace("secret", "NAME"));
    assert!(pair.a.log().contains("secret"), "the source's operator is told: {}", pair.a.log());

    for verb in ["status", "pause", "resume", "cancel"] {
        pair.b.refused(&[verb, "ghost"], &["ghost"]);
    }
    pair.b.refused(&["volume", "remove", "ghost"], &["ghost"]);
    pair.b.refused(&["volume", "show", "ghost"], &["ghost"]);
    let not_served = crate::nbd_client::NbdClient::unix(&pair.b.socket(), "ghost", crate::nbd_client::Replies::Simple);
    let not_served = not_served.err().expect("there is no such export").to_string();
    assert!(not_served.contains("0x80000006"), "NBD_REP_ERR_UNKNOWN, not: {not_served}");
    // No verb at all, or half of one, is wrong usage.
    for args in [&["relocate", "vm"][..], &["relocate"], &["frobnicate"], &["limit", "vm", "fast"]] {
        assert_eq!(pair.b.cli(args).status.code(), Some(2), "{args:?}");
    }
    pair.relocate("vm", &["--wait"]);
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
}

/// One of several fails: the others relocate, and the status says that not all did.
#[test]
fn one_bad_name_does_not_stop_the_others() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(82, 30, 0);
    pair.add("vm", &disk);
    let ran = pair.b.cli(&["relocate", "a/ghost", "a/vm", "--wait"]);
    assert_eq!(ran.status.code(), Some(1), "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("ghost"), "{}", ran.err);
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
}

#[test]
fn a_source_with_another_fingerprint_is_not_believed() {
    let pair = Pair::with(link(200, 4), |_, b| b.peers[0].fingerprint = NOBODY.to_owned());
    let disk = Disk::mixed(83, 20, 0);
    pair.add("vm", &disk);
    let place = pair.path("new.raw");
    let said = pair.b.refused(&["relocate", "a/vm", "--image", text(&place)], &["vm", "a"]);
    assert!(said.contains("fingerprint"), "it says what is wrong: {said}");
    assert!(said.contains(&pair.a.fingerprint), "it says whose it is instead: {said}");
    assert!(!place.exists());
    assert_eq!(pair.a.status("vm")["owner"], "a");
}

#[test]
fn a_peer_that_is_not_listed_gets_nothing_and_is_named_in_the_log() {
    let pair = Pair::with(link(200, 4), |a, _| a.peers.clear());
    let disk = Disk::mixed(84, 20, 0);
    pair.add("vm", &disk);
    let place = pair.path("new.raw");
    pair.b.refused(&["relocate", "a/vm", "--image", text(&place)], &["vm", "a"]);
    assert!(!place.exists());
    assert_eq!(pair.a.status("vm")["owner"], "a");
    let log = pair.a.log();
    assert!(log.contains(&pair.b.fingerprint), "the source's log says who tried: {log}");
}

#[test]
fn a_source_that_is_not_there_is_named() {
    let mut pair = Pair::start(link(200, 4));
    pair.a.stop();
    let place = pair.path("new.raw");
    let said = pair.b.refused(&["relocate", "a/vm", "--image", text(&place)], &["vm", "a"]);
    assert!(said.contains("reached"), "{said}");
    assert!(!place.exists());
}

#[test]
fn configurations_that_are_wrong_are_refused_before_anything_starts() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut site = Site::new(dir.path(), "a");
    let table = [
        ("[store]\nblock_size = \"48KiB\"", "block_size"),
        ("[store]\nblock_size = \"8KiB\"", "block_size"),
        ("[store]\nblock_size = \"2MiB\"", "block_size"),
        ("[store]\nblocksize = \"64KiB\"", "blocksize"),
        ("[stores]\nblock_size = \"64KiB\"", "stores"),
        ("[bulk]\nrate = \"quick\"", "rate"),
        ("[bulk]\nmin_share = 1.5", "min_share"),
        ("[[peers]]\nname = \"b\"\nfingerprint = \"sha256:12\"", "fingerprint"),
        ("[[peers]]\nname = \"b\"", "fingerprint"),
        ("[store", "TOML"),
    ];
    for (section, name) in table {
        site.sections = section.to_owned();
        let ran = site.refused_start();
        assert_eq!(ran.status.code(), Some(2), "{section:?}: {}", ran.err);
        assert!(ran.err.contains(name), "{section:?}: no word of {name:?} in: {}", ran.err);
        assert!(ran.err.contains("blockferry.toml"), "{section:?}: which file? {}", ran.err);
        assert!(!ran.out.contains("ready"));
    }
    // Unknown keys are named with their line.
    site.sections = "[store]\nblocksize = \"64KiB\"".to_owned();
    let said = site.refused_start().err;
    let config = std::fs::read_to_string(site.dir.join("blockferry.toml")).expect("reads");
    let line = config.lines().position(|line| line.starts_with("blocksize")).expect("it is there") + 1;
    assert!(said.contains(&format!("blockferry.toml:{line}:")), "line {line} is not named in: {said}");
    site.sections.clear();
    site.start();
    site.stop();
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let pair = Pair::start(link(200, 4));
    let disk = Disk::mixed(85, 20, 0);
    pair.add("vm", &disk);
    let mut client = pair.a.nbd("vm");
    let mut second = Site::new(pair.dir.path(), "second");
    second.dir = pair.a.dir.clone();
    let ran = second.refused_start();
    assert_eq!(ran.status.code(), Some(1), "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("control.sock") || ran.err.contains("state"), "{}", ran.err);
    // Even if it is told to take another socket.
    second.sections = "[control]\nsocket = \"another.sock\"".to_owned();
    let ran = second.refused_start();
    assert_eq!(ran.status.code(), Some(1), "{}{}", ran.out, ran.err);
    assert!(ran.err.contains(text(&pair.a.dir)), "it names the place: {}", ran.err);
    assert!(!pair.a.dir.join("another.sock").exists(), "it takes its socket along");
    // The first does not notice.
    assert_same("a read", &client.read(0, BLOCK), &disk.bytes[..BLOCK]);
    pair.a.ok(&["status", "--socket", text(&pair.a.dir.join("control.sock"))]);
}
