//! Other people's NBD clients agree: qemu-img, qemu-io, nbdcopy. Left out by name where they are not installed.

use std::process::Command;

use crate::disk::{Disk, assert_same};
use crate::site::{Pair, Ran, link, run, skipped, text};

pub fn is_missing(test: &str, program: &str) -> bool {
    let is_missing = Command::new(program).arg("--version").output().is_err();
    if is_missing {
        skipped(test, &format!("{program} is not installed"));
    }
    is_missing
}

fn qemu_io(uri: &str, commands: &[&str]) -> Ran {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "raw"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    run(qemu_io.arg(uri))
}

#[track_caller]
fn assert_fine(ran: &Ran, what: &str) {
    assert!(ran.status.success(), "{what}: {} {}{}", ran.status, ran.out, ran.err);
    assert!(!ran.out.contains("failed"), "{what}: {}", ran.out);
}

#[test]
fn qemu_img_compare_says_identical_during_and_after_the_copy() {
    if is_missing("qemu_img_compare_says_identical_during_and_after_the_copy", "qemu-img") {
        return;
    }
    let pair = Pair::start(link(40, 10));
    let disk = Disk::mixed(40, 200, 3 * 512);
    let source = pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    for when in ["during", "after"] {
        let compared = run(Command::new("qemu-img")
            .args(["compare", "-U", "-f", "raw", "-F", "raw"])
            .args([text(&source), &pair.b.uri("vm")]));
        assert_fine(&compared, when);
        assert!(compared.out.contains("identical"), "{when}: {}", compared.out);
        pair.b.wait_phase("vm", "released_from_source");
    }
}

#[test]
fn nbdcopy_copies_the_export() {
    if is_missing("nbdcopy_copies_the_export", "nbdcopy") {
        return;
    }
    let pair = Pair::start(link(100, 10));
    let disk = Disk::mixed(41, 200, 777);
    pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    let copy = pair.path("copy.raw");
    let copied = run(Command::new("nbdcopy").arg(pair.b.uri("vm")).arg(&copy));
    assert_fine(&copied, "nbdcopy of a disk that is still arriving");
    assert_same("nbdcopy's file", &std::fs::read(&copy).expect("reads"), &disk.bytes);
}

#[test]
fn what_qemu_io_wrote_survives_a_restart_half_way() {
    if is_missing("what_qemu_io_wrote_survives_a_restart_half_way", "qemu-io") {
        return;
    }
    let mut pair = Pair::start(link(24, 10));
    let mut disk = Disk::noisy(42, 200);
    pair.add("vm", &disk);
    pair.relocate("vm", &[]);
    let written =
        ["write -P 0x5a 1M 64k", "write -P 0xa5 12000256 5120", "write -f -P 0x77 8M 512", "write -z 3M 192k", "flush"];
    assert_fine(&qemu_io(&pair.b.uri("vm"), &written), "writes");
    for (at, len, byte) in
        [(1 << 20, 64 << 10, 0x5a), (12_000_256, 5120, 0xa5), (8 << 20, 512, 0x77), (3 << 20, 192 << 10, 0)]
    {
        disk.bytes[at..at + len].fill(byte);
    }
    pair.b.wait_share("vm", 0.4);
    let status = pair.b.status("vm");
    assert_eq!(status["phase"], "copying", "a restart half-way has to be half-way: {status}");
    pair.b.stop();
    pair.b.start();
    let read = ["read -P 0x5a 1M 64k", "read -P 0xa5 12000256 5120", "read -P 0x77 8M 512", "read -P 0 3M 192k"];
    assert_fine(&qemu_io(&pair.b.uri("vm"), &read), "reads after the restart");
    pair.b.wait_phase("vm", "released_from_source");
    assert_fine(&qemu_io(&pair.b.uri("vm"), &read), "reads after the end");
    assert_same("the disk", &pair.b.nbd("vm").read_all(), &disk.bytes);
}
