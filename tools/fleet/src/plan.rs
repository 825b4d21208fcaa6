//! What a clone has been through since it left the template. Pure: a seed and the template's listing in, a plan out.
//! Must not know: debugfs, where files are staged.

use std::collections::BTreeMap;

use crate::data;
use crate::rng::Rng;
use crate::tree::{Entry, Kind};

/// The database that is rewritten in place.
pub const DATABASE: &str = "var/lib/app/store.db";

/// Who the clone is.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name, which is also its host name.
    pub name: String,
    /// Its own seed.
    pub seed: u64,
    /// How much data of its own it has.
    pub data_bytes: u64,
}

/// What a new file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Log lines.
    Log(usize),
    /// JSON lines.
    Records(usize),
    /// Random bytes.
    Incompressible(usize),
    /// Data at both ends and a hole between.
    Preallocated(usize),
    /// So many pages.
    Database(u64),
    /// This.
    Text(String),
}

/// A file that the clone wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Where.
    pub path: String,
    /// What.
    pub content: Content,
}

impl NewFile {
    /// Its bytes, which depend on the clone and the path alone.
    pub fn render(&self, vm: &Vm) -> Vec<u8> {
        let mut rng = Rng::for_purpose(vm.seed, &self.path);
        match &self.content {
            Content::Log(bytes) => data::log(&vm.name, *bytes, &mut rng),
            Content::Records(bytes) => data::records(*bytes, &mut rng),
            Content::Incompressible(bytes) => data::incompressible(*bytes, &mut rng),
            Content::Preallocated(bytes) => data::preallocated(*bytes, &mut rng),
            Content::Database(pages) => (0..*pages).flat_map(|n| data::page(&vm.name, n, 0, &mut rng)).collect(),
            Content::Text(text) => text.clone().into_bytes(),
        }
    }
}

/// A page of the database that was written again where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Which page.
    pub page: u64,
    /// Whether with zeros.
    pub zeroed: bool,
}

/// Everything that happens to a clone, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Written first and removed last: their blocks stay behind, free and not zero.
    pub temporary: Vec<NewFile>,
    /// Entries of the profile's tree that the template does not have.
    pub added: Vec<Entry>,
    /// Files of the profile's tree that take the place of the template's.
    pub replaced: Vec<Entry>,
    /// Files of the template that were upgraded.
    pub upgraded: Vec<Entry>,
    /// Data of its own.
    pub data: Vec<NewFile>,
    /// Files of the template that were removed.
    pub deleted: Vec<Entry>,
    /// Pages of the database written in place.
    pub rewrites: Vec<Rewrite>,
}

impl Plan {
    /// The life of `vm`, cloned from `template`, with the packages of `profile`.
    pub fn new(vm: &Vm, template: &[Entry], profile: &[Entry]) -> Plan {
        let existing: BTreeMap<&str, &Kind> = template.iter().map(|e| (e.path.as_str(), &e.kind)).collect();
        let (added, replaced) = sort_packages(&existing, profile);
        let deleted = deletions(vm, template);
        let untouchable = |path: &str| {
            deleted.binary_search_by(|e| e.path.as_str().cmp(path)).is_ok() || replaced.iter().any(|e| e.path == path)
        };
        let upgraded = upgrades(vm, template, untouchable);
        let (data, pages) = own_data(vm, &existing);
        let rewrites = rewrites(vm, pages);
        Plan { temporary: temporary(vm), added, replaced, upgraded, data, deleted, rewrites }
    }
}

/// What of the profile is new and what replaces a file. Where the two trees disagree on what is a directory, the
/// template wins.
fn sort_packages(existing: &BTreeMap<&str, &Kind>, profile: &[Entry]) -> (Vec<Entry>, Vec<Entry>) {
    let (mut added, mut replaced) = (Vec::new(), Vec::new());
    for entry in profile {
        let blocked = entry
            .path
            .match_indices('/')
            .any(|(at, _)| existing.get(&entry.path[..at]).is_some_and(|kind| **kind != Kind::Dir));
        if blocked {
            continue;
        }
        match (existing.get(entry.path.as_str()), &entry.kind) {
            (None, _) => added.push(entry.clone()),
            (Some(Kind::File(_)), Kind::File(_)) => replaced.push(entry.clone()),
            _ => {}
        }
    }
    (added, replaced)
}

/// Documents and translations that someone did away with: all of some packages, about one in seven.
fn deletions(vm: &Vm, template: &[Entry]) -> Vec<Entry> {
    let group = |path: &str| -> Option<String> {
        let rest = ["usr/share/doc/", "usr/share/locale/"].iter().find_map(|prefix| path.strip_prefix(prefix))?;
        let (name, _) = rest.split_once('/')?;
        Some(name.to_owned())
    };
    template
        .iter()
        .filter(|entry| entry.kind != Kind::Dir)
        .filter(|entry| {
            group(&entry.path).is_some_and(|name| Rng::for_purpose(vm.seed, &format!("delete {name}")).one_in(7))
        })
        .cloned()
        .collect()
}

/// Programs and libraries of every size, up to three eighths of the clone's own data.
fn upgrades(vm: &Vm, template: &[Entry], untouchable: impl Fn(&str) -> bool) -> Vec<Entry> {
    let mut candidates: Vec<&Entry> = template
        .iter()
        .filter(|entry| matches!(entry.kind, Kind::File(size) if (4096..4 << 20).contains(&size)))
        .filter(|entry| entry.path.starts_with("usr/") && !untouchable(&entry.path))
        .collect();
    Rng::for_purpose(vm.seed, "upgrade").shuffle(&mut candidates);
    let mut left = vm.data_bytes * 3 / 8;
    let mut chosen = Vec::new();
    for entry in candidates {
        if let Kind::File(size) = entry.kind
            && size <= left
        {
            left -= size;
            chosen.push(entry.clone());
        }
    }
    chosen.sort_by(|a, b| a.path.cmp(&b.path));
    chosen
}

/// The clone's own files, and how many pages its database has. Of its data, 3/20 are logs, 7/20 records, 6/20
/// uploads, the rest the database.
fn own_data(vm: &Vm, existing: &BTreeMap<&str, &Kind>) -> (Vec<NewFile>, u64) {
    let mut files = Vec::new();
    let mut rng = Rng::for_purpose(vm.seed, "data");
    let machine_id = Content::Text(format!("{:016x}{:016x}\n", rng.next_u64(), rng.next_u64()));
    for (path, content) in [("etc/hostname", Content::Text(format!("{}\n", vm.name))), ("etc/machine-id", machine_id)] {
        if !existing.contains_key(path) {
            files.push(NewFile { path: path.into(), content });
        }
    }
    let part = |twentieths: u64| vm.data_bytes / 20 * twentieths;
    let mut many = |total: u64, sizes: &[u64], dir: &str, suffix: &str, content: fn(usize) -> Content| {
        let mut left = total;
        let mut number = 0;
        while left > 0 {
            let nominal = rng.pick(sizes).copied().unwrap_or(4096);
            let size = left.min(rng.between(nominal / 2, nominal + nominal / 2));
            files.push(NewFile { path: format!("{dir}{number:04}{suffix}"), content: content(size as usize) });
            left -= size;
            number += 1;
        }
    };
    many(part(3), &[64 << 10, 512 << 10, 2 << 20], "var/log/app/", ".log", Content::Log);
    many(part(7), &[16 << 10, 256 << 10, 1 << 20, 4 << 20], "home/app/data/", ".json", Content::Records);
    many(part(6), &[40 << 10, 300 << 10, 2 << 20], "home/app/uploads/", ".jpg", Content::Incompressible);
    let pages = part(4) / data::PAGE_BYTES as u64;
    files.push(NewFile { path: DATABASE.into(), content: Content::Database(pages) });
    let hole = (vm.data_bytes / 4) as usize;
    files.push(NewFile { path: "var/lib/app/preallocated".into(), content: Content::Preallocated(hole) });
    (files, pages)
}

/// A quarter of the data again: builds and downloads, half of it text.
fn temporary(vm: &Vm) -> Vec<NewFile> {
    let each = (vm.data_bytes / 4 / 8) as usize;
    let file = |n: usize| {
        let content = if n.is_multiple_of(2) { Content::Records(each) } else { Content::Incompressible(each) };
        NewFile { path: format!("var/tmp/build-{n}"), content }
    };
    (0..8).map(file).collect()
}

/// A fifth of the pages, a tenth of which with zeros.
fn rewrites(vm: &Vm, pages: u64) -> Vec<Rewrite> {
    let mut rng = Rng::for_purpose(vm.seed, "rewrite");
    let mut numbers: Vec<u64> = (0..pages).collect();
    rng.shuffle(&mut numbers);
    numbers.truncate((pages / 5) as usize);
    numbers.into_iter().map(|page| Rewrite { page, zeroed: rng.one_in(10) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64) -> Entry {
        Entry { path: path.into(), kind: Kind::File(size) }
    }

    fn dir(path: &str) -> Entry {
        Entry { path: path.into(), kind: Kind::Dir }
    }

    fn vm(seed: u64) -> Vm {
        Vm { name: "vm01-web".into(), seed, data_bytes: 8 << 20 }
    }

    fn template() -> Vec<Entry> {
        let mut entries = vec![dir("etc"), file("etc/hostname", 5), dir("lib"), dir("usr")];
        entries.extend((0..200).map(|n| file(&format!("usr/lib/lib{n:03}.so"), 20_000 + n)));
        entries.extend((0..200).map(|n| file(&format!("usr/share/doc/p{n:03}/copyright"), 9000)));
        entries
    }

    #[test]
    fn a_plan_repeats_and_differs_by_seed() {
        assert_eq!(Plan::new(&vm(1), &template(), &[]), Plan::new(&vm(1), &template(), &[]));
        assert_ne!(Plan::new(&vm(1), &template(), &[]), Plan::new(&vm(2), &template(), &[]));
    }

    #[test]
    fn packages_are_added_or_replace_and_never_clash() {
        let mut template = template();
        template.push(Entry { path: "sbin".into(), kind: Kind::Link("usr/sbin".into()) });
        let profile = [
            dir("lib"),
            file("etc/hostname", 9),
            file("lib", 1),
            file("sbin/tool", 1),
            dir("usr/x"),
            file("usr/x/y", 1),
        ];
        let plan = Plan::new(&vm(1), &template, &profile);
        assert_eq!(plan.replaced, [file("etc/hostname", 9)]);
        assert_eq!(plan.added, [dir("usr/x"), file("usr/x/y", 1)]);
    }

    #[test]
    fn sizes_follow_the_data_asked_for() {
        let plan = Plan::new(&vm(1), &template(), &[]);
        let sizes = |files: &[Entry]| -> u64 {
            files.iter().map(|e| if let Kind::File(size) = e.kind { size } else { 0 }).sum()
        };
        let upgraded = sizes(&plan.upgraded);
        assert!(upgraded <= 3 << 20 && upgraded > (3 << 20) - 40_000, "{upgraded}");
        assert!((10..50).contains(&plan.deleted.len()), "{}", plan.deleted.len());
        let written: u64 = plan
            .data
            .iter()
            .filter(|f| !matches!(f.content, Content::Preallocated(_)))
            .map(|f| f.render(&vm(1)).len() as u64)
            .sum();
        assert!(written.abs_diff(8 << 20) < 20_000, "{written}");
        assert!(plan.rewrites.len() >= 30 && plan.rewrites.iter().any(|r| r.zeroed));
    }

    #[test]
    fn nothing_is_touched_twice() {
        let profile = [file("usr/lib/lib007.so", 20_000)];
        let plan = Plan::new(&vm(3), &template(), &profile);
        let mut paths: Vec<&str> = [&plan.upgraded, &plan.deleted, &plan.replaced, &plan.added]
            .into_iter()
            .flatten()
            .map(|e| e.path.as_str())
            .chain(plan.data.iter().chain(&plan.temporary).map(|f| f.path.as_str()))
            .collect();
        let count = paths.len();
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), count);
        assert!(!plan.data.iter().any(|f| f.path == "etc/hostname"), "the template has one");
    }

    #[test]
    fn no_data_is_a_plan_too() {
        let plan = Plan::new(&Vm { data_bytes: 0, ..vm(1) }, &template(), &[]);
        assert!(plan.upgraded.is_empty() && plan.rewrites.is_empty());
        for file in plan.data.iter().chain(&plan.temporary) {
            file.render(&vm(1));
        }
    }
}
