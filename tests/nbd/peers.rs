//! Other people's clients on both kinds of volume: nbdinfo, nbdcopy, qemu-img, qemu-io, nbdsh, fio. Left out by name where
//! they are not installed. (Relocations seen through such clients are in `tests/e2e/tools.rs`.)

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::disk::{Disk, assert_same, noise};
use crate::kinds::{EXPORT, Kind, on_both_kinds};
use crate::site::{Ran, run, skipped, text};

/// Whether a program is missing; says which test is left out because of it.
pub fn is_missing(test: &str, program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !is_there {
        skipped(test, &format!("{program} is not installed"));
    }
    !is_there
}

#[track_caller]
pub fn fine(command: &mut Command) -> Ran {
    let ran = run(command);
    assert!(ran.status.success(), "{command:?}: {}: {}{}", ran.status, ran.out, ran.err);
    ran
}

fn uri(kind: &Kind) -> String {
    kind.site().uri(EXPORT)
}

#[track_caller]
fn json(command: &mut Command) -> Value {
    serde_json::from_str(&fine(command).out).expect("JSON")
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    if is_missing("nbdinfo_sees_what_is_offered", "nbdinfo") {
        return;
    }
    on_both_kinds(40, 60, |kind| {
        let info = json(Command::new("nbdinfo").args(["--json", "--no-content"]).arg(uri(kind)));
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], kind.size_bytes(), "{info}");
        for can in ["flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn", "df"] {
            assert_eq!(export[format!("can_{can}")], true, "{can}: {info}");
        }
        assert_eq!(export["is_read_only"], false);
        assert!(export["contexts"].as_array().expect("contexts").contains(&"base:allocation".into()), "{info}");

        let socket = kind.socket();
        let server = format!("nbd+unix://?socket={}", text(&socket));
        let listed = json(Command::new("nbdinfo").args(["--list", "--json", "--no-content"]).arg(server));
        assert_eq!(listed["exports"][0]["export-name"], EXPORT, "{listed}");

        let map = json(Command::new("nbdinfo").args(["--map", "--json"]).arg(uri(kind)));
        let mut at = 0;
        for extent in map.as_array().expect("extents") {
            let field = |name: &str| extent[name].as_u64().expect("a number");
            assert_eq!(field("offset"), at, "{map}");
            let bytes = &kind.bytes[at as usize..(at + field("length")) as usize];
            assert!(field("type") & 2 == 0 || bytes.iter().all(|byte| *byte == 0), "data is called zero: {extent}");
            at += field("length");
        }
        assert_eq!(at, kind.size_bytes());
    });
}

/// What has arrived, as its own metadata context tells it and as `status` does.
#[test]
fn nbdinfo_shows_what_has_arrived() {
    if is_missing("nbdinfo_shows_what_has_arrived", "nbdinfo")
        || is_missing("nbdinfo_shows_what_has_arrived", "qemu-io")
    {
        return;
    }
    on_both_kinds(46, 60, |kind| {
        let write = ["-f", "raw", "-c", "write 0 65536", "-c", "write 200704 512", "-c", "read 1M 128k"];
        fine(Command::new("qemu-io").args(write).arg(uri(kind)));
        // What the guest reads may bring some more by readahead: until nothing moves any more.
        let blocks = || kind.site().status(EXPORT)["blocks"].clone();
        let (mut before, mut tries) = (Value::Null, 0);
        while blocks() != before && tries < 100 {
            (before, tries) = (blocks(), tries + 1);
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let mut command = Command::new("nbdinfo");
        let map = json(command.args(["--map=blockferry:residency", "--json"]).arg(uri(kind)));
        let mut found = [0; 4];
        for extent in map.as_array().expect("extents") {
            let field = |name: &str| extent[name].as_u64().expect("a number");
            found[field("type") as usize] += field("length").div_ceil(65536);
        }
        let [present, absent, written, partial] = found;
        let told = |name: &str| before[name].as_u64().expect("a count");
        assert_eq!(absent + partial, told("absent"), "{map} {before}");
        assert_eq!(written, told("written"), "{map} {before}");
        assert_eq!(present + absent + written + partial, told("total"), "{map} {before}");
        let is_complete = kind.name == "complete";
        assert_eq!((absent == 0, written, partial), (is_complete, u64::from(!is_complete), u64::from(!is_complete)));
    });
}

/// Copies out, and a new content in.
#[test]
fn nbdcopy_copies_both_ways() {
    if is_missing("nbdcopy_copies_both_ways", "nbdcopy") {
        return;
    }
    for (nth, options) in [&[][..], &["--connections=4", "--requests=32"], &["--synchronous"]].into_iter().enumerate() {
        let (seed, dir) = (41 + nth as u64, tempfile::tempdir().expect("a directory"));
        on_both_kinds_copied(seed, |kind| {
            let out = dir.path().join(format!("{}.out", kind.name));
            fine(Command::new("nbdcopy").args(options).arg(uri(kind)).arg(&out));
            assert_same("nbdcopy's file", &std::fs::read(&out).expect("reads"), &kind.bytes);
            let new = Disk::mixed(seed + 100, 60, 3 * 512);
            let file = dir.path().join(format!("{}.new", kind.name));
            new.write_to(&file);
            fine(Command::new("nbdcopy").args(options).args(["--flush"]).arg(&file).arg(uri(kind)));
            let mut reader = kind.site().nbd(EXPORT);
            assert_same("what nbdcopy wrote", &reader.read_all(), &new.bytes);
        });
    }
}

/// As [`on_both_kinds`], where the check makes all of the volume arrive.
fn on_both_kinds_copied(seed: u64, check: impl Fn(&Kind)) {
    let disk = Disk::mixed(seed, 60, 3 * 512);
    for kind in [Kind::complete(&disk), Kind::relocating(&disk)] {
        eprintln!("on a volume that is {}", kind.name);
        kind.assert_unfinished();
        check(&kind);
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    if is_missing("qemu_img_converts_and_compares", "qemu-img") {
        return;
    }
    on_both_kinds_copied(50, |kind| {
        let dir = tempfile::tempdir().expect("a directory");
        let copy = dir.path().join("copy.qcow2");
        let qemu_img = || Command::new("qemu-img");
        fine(qemu_img().args(["convert", "-f", "raw", "-O", "qcow2", &uri(kind), text(&copy)]));
        let same = fine(qemu_img().args(["compare", "-f", "raw", "-F", "qcow2", &uri(kind), text(&copy)]));
        assert!(same.out.contains("identical"), "{}", same.out);
        let new = Disk::mixed(51, 60, 3 * 512);
        let file = dir.path().join("new.raw");
        new.write_to(&file);
        // Without zeroing first: -n takes the export as it is.
        fine(qemu_img().args(["convert", "-n", "-f", "raw", "-O", "raw", text(&file), &uri(kind)]));
        assert_same("what qemu-img wrote", &kind.site().nbd(EXPORT).read_all(), &new.bytes);
    });
}

#[test]
fn qemu_io_finds_its_patterns() {
    if is_missing("qemu_io_finds_its_patterns", "qemu-io") {
        return;
    }
    on_both_kinds(52, 60, |kind| {
        let script = [
            "write -P 0x11 0 64k",
            "write -P 0x22 1000 3000",
            "write -f -P 0x33 70000 1",
            "aio_write -P 0x44 1M 256k",
            "aio_write -P 0x55 1536k 64k",
            "aio_flush",
            "write -z -u 1088k 64k",
            "write -z 1600001 77",
            "discard 65536 4096",
            "flush",
            "read -P 0x11 0 1000",
            "read -P 0x22 1000 3000",
            "read -P 0x11 4000 61536",
            "read -P 0x33 70000 1",
            "read -P 0x44 1M 64k",
            "read -P 0 1088k 64k",
            "read -P 0x44 1152k 128k",
            "read -P 0 1600001 77",
            "read -P 0x55 1536k 16k",
        ];
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw", "-t", "writeback"]);
        for line in script {
            qemu_io.args(["-c", line]);
        }
        let ran = fine(qemu_io.arg(uri(kind)));
        assert!(!ran.out.contains("failed") && !ran.out.contains("error"), "{}", ran.out);
    });
}

/// libnbd at its lowest: every flag, errors, many requests in flight, with simple replies, structured ones, and extended headers
/// where it knows them.
#[test]
fn nbdsh_goes_through_the_protocol() {
    let test = "nbdsh_goes_through_the_protocol";
    if is_missing(test, "nbdsh") {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nbd/peers.py");
    on_both_kinds(53, 60, |kind| {
        let mut nbdsh = Command::new("nbdsh");
        // The module belongs to the distribution's Python.
        nbdsh.env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()));
        nbdsh.env("NBD_URI", uri(kind)).env("NBD_SIZE", kind.size_bytes().to_string());
        let ran = fine(nbdsh.arg("-c").arg(format!("exec(open({:?}).read())", text(&script))));
        if ran.out.contains("no extended headers") {
            skipped(test, "extended headers: this libnbd does not know them");
        }
        assert!(ran.out.contains("all is well"), "{}{}", ran.out, ran.err);
    });
}

#[test]
fn fio_verifies_what_it_wrote() {
    if is_missing("fio_verifies_what_it_wrote", "fio") {
        return;
    }
    let engines = run(Command::new("fio").arg("--enghelp"));
    if !engines.out.lines().any(|line| line.trim() == "nbd") {
        return skipped("fio_verifies_what_it_wrote", "this fio has no engine for nbd");
    }
    on_both_kinds_copied(54, |kind| {
        let dir = tempfile::tempdir().expect("a directory");
        for job in [&["--bs=4k", "--iodepth=32"][..], &["--bsrange=512-128k", "--blockalign=512", "--iodepth=8"]] {
            let mut fio = Command::new("fio");
            fio.current_dir(&dir).args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--size=3M"]);
            fio.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=7", "--fsync=64"]);
            fine(fio.arg(format!("--uri={}", uri(kind))).args(job));
        }
    });
}

/// Several clients of several kinds at once, each on a part of its own.
#[test]
fn clients_of_several_kinds_at_once() {
    let test = "clients_of_several_kinds_at_once";
    if is_missing(test, "qemu-io") || is_missing(test, "nbdcopy") {
        return;
    }
    on_both_kinds_copied(55, |kind| {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("out");
        std::thread::scope(|scope| {
            scope.spawn(|| fine(Command::new("nbdcopy").arg(uri(kind)).arg(&out)));
            for nth in 0..3u64 {
                scope.spawn(move || {
                    let at = nth << 20;
                    let lines = [format!("write -P {} {at} 1M", nth + 1), format!("read -P {} {at} 1M", nth + 1)];
                    let mut qemu_io = Command::new("qemu-io");
                    qemu_io.args(["-f", "raw", "-c", &lines[0], "-c", "flush", "-c", &lines[1]]);
                    let ran = fine(qemu_io.arg(uri(kind)));
                    assert!(!ran.out.contains("failed"), "{}", ran.out);
                });
            }
            let mut own = kind.site().nbd_structured(EXPORT);
            for nth in 0..20 {
                own.write(3 << 20, &noise(100_000, nth));
                assert_same("beside the others", &own.read(3 << 20, 100_000), &noise(100_000, nth));
            }
        });
        let (out, now) = (std::fs::read(&out).expect("reads"), kind.site().nbd(EXPORT).read_all());
        let rest = (3 << 20) + 100_000;
        assert_same("what nobody wrote", &out[rest..], &kind.bytes[rest..]);
        assert_same("what nobody wrote", &now[rest..], &kind.bytes[rest..]);
        for nth in 0..3 {
            assert!(now[nth << 20..(nth + 1) << 20].iter().all(|byte| *byte == nth as u8 + 1));
        }
    });
}
