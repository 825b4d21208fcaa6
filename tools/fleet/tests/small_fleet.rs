//! A whole fleet, small: 64 MiB images from a generated tree. Left out, saying so, where e2fsprogs is not installed.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use blockferry_fleet::command::is_installed;
use blockferry_fleet::fleet::Tree;
use blockferry_fleet::{Contents, FleetOptions, FleetReport, Profile, build};

const SIZE: u64 = 64 << 20;
const ZERO: [u8; 4096] = [0; 4096];

fn tools_are_missing(test: &str) -> bool {
    let missing = ["mkfs.ext4", "debugfs", "e2fsck"].into_iter().find(|program| !is_installed(program));
    if let Some(program) = missing {
        eprintln!("{test}: left out, {program} is not installed (apt-get install e2fsprogs)");
    }
    missing.is_some()
}

/// Bytes that repeat from run to run and that no two files share.
fn bytes(of: &str, len: usize) -> Vec<u8> {
    let mut rng = blockferry_fleet::rng::Rng::for_purpose(9, of);
    blockferry_fleet::data::records(len, &mut rng)
}

fn put(root: &Path, path: &str, content: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn contents(dir: &Path) -> Contents {
    let (template, profile) = (dir.join("template"), dir.join("profile"));
    if !template.exists() {
        fill(&template, &profile);
    }
    let tree = |root, id: &str| Tree { root, id: id.into(), packages: vec![id.into()] };
    Contents {
        source: "generated".into(),
        template: tree(template, "t1"),
        profiles: vec![Profile { name: "app".into(), tree: tree(profile, "p1") }],
    }
}

fn fill(template: &Path, profile: &Path) {
    for n in 0..60 {
        let (lib, doc) = (format!("usr/lib/lib{n}.so"), format!("usr/share/doc/p{n}/copyright"));
        put(template, &lib, &bytes(&lib, 100_000 + n));
        put(template, &doc, &bytes(&doc, 20_000 + n));
    }
    put(template, "etc/name with spaces", b"text\n");
    put(template, "etc/quo\"ted", b"text\n");
    put(template, "var/lib/dpkg/status", b"Package: one\n");
    std::os::unix::fs::symlink("lib0.so", template.join("usr/lib/lib.so")).unwrap();
    put(profile, "usr/share/app/v\u{e9}lo", &bytes("app", 500_000));
    put(profile, "usr/lib/new.so", &bytes("new", 70_000));
    put(profile, "var/lib/dpkg/status", b"Package: one\nPackage: two\n");
    std::os::unix::fs::symlink("new.so", profile.join("usr/lib/newest.so")).unwrap();
}

fn options(dir: &Path, out: &str, seed: u64) -> FleetOptions {
    FleetOptions { out: dir.join(out), cache: dir.join("cache"), vms: 2, size: SIZE, seed, data_bytes: 4 << 20 }
}

fn make(dir: &Path, out: &str, seed: u64) -> FleetReport {
    build(&options(dir, out, seed), &contents(&dir.join("trees")), &|_| ()).unwrap()
}

fn image(report: &FleetReport, n: usize) -> Vec<u8> {
    fs::read(&report.images[n].path).unwrap()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    // Files start at a block.
    haystack.chunks(4096).any(|block| block.starts_with(needle))
}

#[test]
fn clones_resemble_their_template_and_each_other() {
    if tools_are_missing("clones_resemble_their_template_and_each_other") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // build() checks every image with e2fsck.
    let report = make(dir.path(), "out", 1);
    let names: Vec<&str> = report.images.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, ["template", "vm01-app", "vm02-app"]);
    let (template, one, two) = (image(&report, 0), image(&report, 1), image(&report, 2));
    assert!([&template, &one, &two].into_iter().all(|image| image.len() as u64 == SIZE));
    assert!(report.images.iter().all(|image| image.allocated_bytes < SIZE / 2), "sparse");

    let data_blocks = |image: &[u8]| image.chunks(4096).filter(|b| **b != ZERO).count();
    let same_place = template.chunks(4096).zip(one.chunks(4096)).filter(|(a, b)| a == b && **a != ZERO);
    let share = same_place.count() as f64 / data_blocks(&template) as f64;
    assert!((0.6..0.99).contains(&share), "{share}");
    let of_two: HashSet<&[u8]> = two.chunks(4096).collect();
    let shared = one.chunks(4096).filter(|b| **b != ZERO && of_two.contains(b)).count();
    assert!(shared * 2 > data_blocks(&one) && shared < data_blocks(&one), "{shared}");

    let app = &bytes("app", 500_000)[..4096];
    assert!(contains(&one, app) && contains(&two, app) && !contains(&template, app));
    assert!(contains(&one, b"vm01-app\n") && contains(&two, b"vm02-app\n"));
    assert!(contains(&one, b"Package: one\nPackage: two\n"));

    let changes = report.images[1].changes.as_ref().unwrap();
    assert!(changes.package_files == 3 && changes.deleted_files > 0 && changes.upgraded_files > 5, "{changes:?}");
    assert!(changes.stale_bytes > 900_000 && changes.rewritten_pages > 10, "{changes:?}");
}

#[test]
fn deleted_and_rewritten_blocks_are_as_a_guest_leaves_them() {
    use blockferry_fleet::plan::{Plan, Vm};
    use blockferry_fleet::tree;

    if tools_are_missing("deleted_and_rewritten_blocks_are_as_a_guest_leaves_them") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let trees = dir.path().join("trees");
    let report = make(dir.path(), "out", 1);
    let one = &report.images[1];
    let raw = image(&report, 1);
    let contents = contents(&trees);
    let vm = Vm { name: one.name.clone(), seed: one.seed, data_bytes: 4 << 20 };
    let listing = |tree: &Tree| tree::list(&tree.root).unwrap();
    let plan = Plan::new(&vm, &listing(&contents.template), &listing(&contents.profiles[0].tree));
    let deleted = &plan.deleted[0].path;
    let stale = fs::read(contents.template.root.join(deleted)).unwrap();
    assert!(contains(&raw, &stale[..4096]), "the blocks of {deleted} stay behind");
    let temporary = plan.temporary[1].render(&vm);
    assert!(contains(&raw, &temporary[4096..8192]), "a temporary file leaves stale blocks");
    let rewritten = plan.rewrites.iter().find(|rewrite| !rewrite.zeroed).unwrap();
    let header = format!("page {} generation 1 of {}\n", rewritten.page, vm.name);
    assert!(contains(&raw, header.as_bytes()), "{header}");
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_does_not() {
    if tools_are_missing("the_same_seed_gives_the_same_bytes_and_another_does_not") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (first, again, other) = (make(dir.path(), "a", 1), make(dir.path(), "b", 1), make(dir.path(), "c", 2));
    for n in 0..3 {
        assert!(image(&first, n) == image(&again, n), "{}", first.images[n].name);
        assert!(image(&first, n) != image(&other, n), "{}", first.images[n].name);
    }
}

#[test]
fn images_are_reused_until_something_changes() {
    if tools_are_missing("images_are_reused_until_something_changes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let first = make(dir.path(), "out", 1);
    assert_eq!(make(dir.path(), "out", 1), first, "times of writing included");
    let before = image(&first, 1);
    fs::write(&first.images[1].path, b"a guest was here").unwrap();
    let second = make(dir.path(), "out", 1);
    assert!(image(&second, 1) == before);
    assert_eq!((&second.images[0], &second.images[2]), (&first.images[0], &first.images[2]));
    let more = FleetOptions { data_bytes: 5 << 20, ..options(dir.path(), "out", 1) };
    let third = build(&more, &contents(&dir.path().join("trees")), &|_| ()).unwrap();
    assert_eq!(third.images[0], first.images[0], "the template does not depend on it");
    assert_ne!(third.images[1].recipe, first.images[1].recipe);
}

#[test]
fn what_cannot_be_made_is_a_clear_error() {
    if tools_are_missing("what_cannot_be_made_is_a_clear_error") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let contents = contents(&dir.path().join("trees"));
    let too_much = FleetOptions { data_bytes: 100 << 20, ..options(dir.path(), "full", 1) };
    let error = build(&too_much, &contents, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("debugfs") && error.contains("vm0"), "{error}");
    assert!(!dir.path().join("full/vm01-app.img").exists());

    let foreign = options(dir.path(), "foreign", 1);
    fs::create_dir(&foreign.out).unwrap();
    fs::write(foreign.out.join("template.img"), b"precious").unwrap();
    let error = build(&foreign, &contents, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("template.img") && error.contains("move it away"), "{error}");
    assert_eq!(fs::read(foreign.out.join("template.img")).unwrap(), b"precious");
}
