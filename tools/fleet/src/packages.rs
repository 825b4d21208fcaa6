//! Directory trees out of Debian packages, with apt's own resolver and without root: nothing is installed.
//! Must not know: images.
//!
//! Downloads and trees are cached. Which versions a list of packages means is decided once and kept in the cache, so
//! that images do not change under a fleet; remove the cache to move on.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::command::{self, FAKE_TIME, command};
use crate::error::FleetError;
use crate::fleet::{Contents, Profile, Tree};
use crate::recipe;
use crate::tree::{self, Kind};

/// The least image that the template and a clone fit into, in bytes.
pub const IMAGE_MIN_BYTES: u64 = 1 << 30;

/// What every machine of a fleet has: an ordinary server, with the kernel for virtual machines.
#[rustfmt::skip]
const TEMPLATE: &[&str] = &[
    "bash", "bash-completion", "ca-certificates", "cloud-init", "coreutils", "cron", "curl", "dbus", "e2fsprogs",
    "gdb", "git", "initramfs-tools", "iproute2", "iputils-ping", "kmod", "less", "libpam-systemd",
    "linux-image-cloud-amd64", "locales", "logrotate", "lsof", "openssh-server", "perl", "procps", "psmisc",
    "python3", "python3-pip", "rsyslog", "sudo", "systemd", "systemd-sysv", "tzdata", "udev", "vim",
];

/// What makes machines differ. VM i has profile (i - 1) modulo their number.
const PROFILES: &[(&str, &[&str])] = &[
    ("web", &["nginx", "php-fpm"]),
    ("py", &["redis-server", "python3-numpy", "python3-flask", "gunicorn"]),
    ("mail", &["postfix", "dovecot-imapd", "spamassassin"]),
    ("build", &["cmake", "make"]),
    ("mq", &["rabbitmq-server"]),
    ("files", &["samba"]),
];

/// A package file, as apt names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Deb {
    file: String,
    size: u64,
}

impl Deb {
    /// Out of a line of `apt-get --print-uris`: `'URL' FILE SIZE [HASH]`.
    fn parse(line: &str) -> Option<Deb> {
        let mut words = line.strip_prefix('\'')?.split_once("' ")?.1.split(' ');
        let file = words.next().filter(|file| file.ends_with(".deb") && !file.contains('/'))?;
        Some(Deb { file: file.to_owned(), size: words.next()?.parse().ok()? })
    }

    /// `git=1:2.39.5-0`, which is what `apt-get download` wants; the file name spells the colon `%3a`.
    fn name_and_version(&self) -> String {
        let mut parts = self.file.split('_');
        let (name, version) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        format!("{name}={}", version.replace("%3a", ":"))
    }

    fn package(&self) -> &str {
        self.file.split('_').next().unwrap_or("")
    }
}

/// The trees of the template and of the first `vms` profiles, downloaded and unpacked where the cache does not have
/// them.
///
/// # Errors
/// [`FleetError::Packages`] when apt cannot say what is needed or cannot fetch it; [`FleetError::Missing`] without
/// dpkg.
pub fn contents(cache: &Path, vms: usize, say: &(dyn Fn(&str) + Sync)) -> Result<Contents, FleetError> {
    command::require("dpkg-deb", "dpkg")?;
    if !command::is_installed("apt-get") {
        return Err(FleetError::Packages("there is no apt-get here".into()));
    }
    for dir in ["debs", "resolved", "trees", "empty/partial"] {
        let dir = cache.join(dir);
        fs::create_dir_all(&dir).map_err(FleetError::file("create the directory", &dir))?;
    }
    let profiles = &PROFILES[..vms.min(PROFILES.len())];
    // Versions kept from an earlier day may be gone from the mirror: then they are decided anew, once.
    collect(cache, profiles, say).or_else(|error| match error {
        FleetError::Packages(reason) => {
            say(&format!("deciding package versions anew ({reason})"));
            let kept = cache.join("resolved");
            fs::remove_dir_all(&kept).map_err(FleetError::file("remove", &kept))?;
            fs::create_dir_all(&kept).map_err(FleetError::file("create the directory", &kept))?;
            collect(cache, profiles, say)
        }
        other => Err(other),
    })
}

fn collect(cache: &Path, profiles: &[(&str, &[&str])], say: &(dyn Fn(&str) + Sync)) -> Result<Contents, FleetError> {
    let template = resolve(cache, TEMPLATE)?;
    let mut sets = vec![template.clone()];
    for (_, names) in profiles {
        let all = resolve(cache, &[TEMPLATE, names].concat())?;
        sets.push(all.into_iter().filter(|deb| !template.contains(deb)).collect());
    }
    let have_all = sets.iter().all(|debs| cache.join("trees").join(tree_id(debs)).exists());
    if !have_all {
        download(cache, &sets.concat(), say)?;
    }
    let template_status = if have_all { String::new() } else { status(cache, &sets[0])? };
    let mut trees = Vec::new();
    for (i, debs) in sets.iter().enumerate() {
        // A profile's tree has the whole machine's list of packages, as dpkg rewrites it.
        let inherited = if i == 0 { "" } else { &template_status };
        trees.push(unpack(cache, debs, inherited, say)?);
    }
    let mut trees = trees.into_iter();
    let template = trees.next().ok_or_else(|| FleetError::Packages("the template has no packages".into()))?;
    let profiles = profiles.iter().zip(trees).map(|((name, _), tree)| Profile { name: (*name).into(), tree }).collect();
    Ok(Contents { source: "packages".into(), template, profiles })
}

/// Which package files these packages and all that they depend on are.
fn resolve(cache: &Path, names: &[&str]) -> Result<Vec<Deb>, FleetError> {
    let kept = cache.join("resolved").join(format!("{}.json", recipe::id(names.iter().copied())));
    if let Some(debs) = fs::read(&kept).ok().and_then(|json| serde_json::from_slice::<Vec<Deb>>(&json).ok()) {
        return Ok(debs);
    }
    let mut apt = apt_get(cache);
    // As on a machine where nothing is installed.
    apt.args(["-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false"]);
    apt.args(["install", "--print-uris", "-qq", "-y"]).args(names);
    let printed = command::run(&mut apt, "the list of packages").map_err(|e| FleetError::Packages(e.to_string()))?;
    let mut debs: Vec<Deb> = printed.lines().filter_map(Deb::parse).collect();
    debs.sort_by(|a, b| a.file.cmp(&b.file));
    if debs.is_empty() {
        return Err(FleetError::Packages("apt-get names no package files".into()));
    }
    let json = serde_json::to_vec_pretty(&debs).map_err(|e| FleetError::Packages(e.to_string()))?;
    fs::write(&kept, json).map_err(FleetError::file("write", &kept))?;
    Ok(debs)
}

fn apt_get(cache: &Path) -> std::process::Command {
    let mut apt = command("apt-get");
    apt.args(["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]);
    // An empty archive directory, or apt would leave out what it has in its own.
    apt.arg("-o").arg(format!("Dir::Cache::archives={}", cache.join("empty").display()));
    apt
}

fn download(cache: &Path, debs: &[Deb], say: &(dyn Fn(&str) + Sync)) -> Result<(), FleetError> {
    let dir = cache.join("debs");
    let is_here = |deb: &Deb| fs::metadata(dir.join(&deb.file)).is_ok_and(|meta| meta.len() == deb.size);
    let missing: Vec<&Deb> = debs.iter().filter(|deb| !is_here(deb)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let bytes: u64 = missing.iter().map(|deb| deb.size).sum();
    say(&format!("downloading {} packages, {} MiB", missing.len(), bytes >> 20));
    let mut apt = apt_get(cache);
    apt.args(["-qq", "download"]).args(missing.iter().map(|deb| deb.name_and_version())).current_dir(&dir);
    command::run(&mut apt, "the packages").map_err(|e| FleetError::Packages(e.to_string()))?;
    match missing.iter().find(|deb| !is_here(deb)) {
        Some(deb) => Err(FleetError::Packages(format!("apt-get did not fetch {}", deb.file))),
        None => Ok(()),
    }
}

fn tree_id(debs: &[Deb]) -> String {
    recipe::id(debs.iter().map(|deb| deb.file.as_str()))
}

fn unpack(cache: &Path, debs: &[Deb], inherited: &str, say: &(dyn Fn(&str) + Sync)) -> Result<Tree, FleetError> {
    let id = tree_id(debs);
    let packages = debs.iter().map(|deb| deb.package().to_owned()).collect();
    let root = cache.join("trees").join(&id);
    if root.exists() {
        return Ok(Tree { root, id, packages });
    }
    say(&format!("unpacking {} packages", debs.len()));
    let part = root.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part).map_err(FleetError::file("remove", &part))?;
    }
    fs::create_dir_all(&part).map_err(FleetError::file("create the directory", &part))?;
    let todo = Mutex::new(debs.iter());
    let next = || todo.lock().map(|mut debs| debs.next()).unwrap_or(None);
    let worker = || -> Result<(), FleetError> {
        while let Some(deb) = next() {
            let file = cache.join("debs").join(&deb.file);
            command::run(command("dpkg-deb").arg("-x").args([&file, &part]), &deb.file)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(worker);
        let first = worker();
        let second = second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        first.and(second)
    })?;
    let list = part.join("var/lib/dpkg/status");
    if let Some(dir) = list.parent() {
        fs::create_dir_all(dir).map_err(FleetError::file("create the directory", dir))?;
    }
    fs::write(&list, format!("{inherited}{}", status(cache, debs)?)).map_err(FleetError::file("write", &list))?;
    settle_times(&part, &list)?;
    fs::rename(&part, &root).map_err(FleetError::file("rename", &part))?;
    Ok(Tree { root, id, packages })
}

/// What dpkg would note of these packages.
fn status(cache: &Path, debs: &[Deb]) -> Result<String, FleetError> {
    let mut text = String::new();
    for deb in debs {
        let file: PathBuf = cache.join("debs").join(&deb.file);
        let fields = command::run(command("dpkg-deb").arg("-f").arg(file), &deb.file)?;
        let (name, rest) = fields.split_once('\n').unwrap_or((&fields, ""));
        text += &format!("{name}\nStatus: install ok installed\n{rest}\n");
    }
    Ok(text)
}

/// Directories carry the time of unpacking, and so does the list: give them the time that all images have.
fn settle_times(root: &Path, list: &Path) -> Result<(), FleetError> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(FAKE_TIME);
    let set = |path: &Path| {
        let file = File::open(path).map_err(FleetError::file("open", path))?;
        file.set_modified(time).map_err(FleetError::file("set the time of", path))
    };
    set(list)?;
    set(root)?;
    let dirs = tree::list(root)?.into_iter().filter(|entry| entry.kind == Kind::Dir);
    dirs.map(|entry| root.join(entry.path)).try_for_each(|dir| set(&dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_apt() {
        let line = "'http://deb.debian.org/debian/pool/main/g/git/git_2.39.5-0%2bdeb12u3_amd64.deb' \
                    git_1%3a2.39.5-0+deb12u3_amd64.deb 7264380 MD5Sum:b493";
        let deb = Deb::parse(line).unwrap();
        assert_eq!((deb.size, deb.package()), (7_264_380, "git"));
        assert_eq!(deb.name_and_version(), "git=1:2.39.5-0+deb12u3");
        for wrong in
            ["", "Reading package lists...", "'http://x/y' y.txt 5", "'http://x/y.deb' ../y.deb 5", "'a' b.deb x"]
        {
            assert_eq!(Deb::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn trees_are_named_by_their_package_files() {
        let deb = |file: &str| Deb { file: file.into(), size: 1 };
        assert_ne!(tree_id(&[deb("a_1_all.deb")]), tree_id(&[deb("a_2_all.deb")]));
    }
}
