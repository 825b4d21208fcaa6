//! What an image is, apart from its path: the inode of a file, the hardware behind a device node. Must not know its content.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use nix::libc;
use serde::{Deserialize, Serialize};

use super::{Image, ImageError};

/// From linux/loop.h.
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;

/// Files of a disk's folder in sysfs that name its hardware, or what the kernel made it of.
const SYSFS_IDS: [&str; 6] = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial"];

/// What names an image, as far as the kernel tells. A path is none of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Identity {
    /// A regular file.
    File {
        /// `st_dev`: may be another after a boot.
        device: u64,
        /// `st_ino`.
        inode: u64,
        /// When the inode was made, nanoseconds since the epoch, where the file system notes it.
        born_ns: Option<u64>,
        /// In bytes.
        size_bytes: u64,
    },
    /// A block device.
    Device {
        /// `st_rdev`: kernel names are given anew at each boot.
        number: u64,
        /// In bytes.
        size_bytes: u64,
        /// What names the hardware or the backing behind the node, by where it was found.
        ids: BTreeMap<String, String>,
    },
}

/// Whether one identity is another's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sameness {
    /// It is the same thing.
    Same,
    /// Nothing proves either: the content decides.
    Unsure(String),
    /// It is another thing.
    Other(String),
}

impl Identity {
    /// Of a regular file.
    pub(super) fn of_file(meta: &Metadata) -> Identity {
        let born = meta.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        Identity::File {
            device: meta.dev(),
            inode: meta.ino(),
            born_ns: born.and_then(|born| u64::try_from(born.as_nanos()).ok()),
            size_bytes: meta.len(),
        }
    }

    fn of_device(meta: &Metadata, fd: RawFd, size_bytes: u64) -> Identity {
        let mut ids = BTreeMap::new();
        if let Some((inode, device)) = loop_backing(fd) {
            ids.insert("loop/inode".to_owned(), inode.to_string());
            ids.insert(LOOP_DEVICE.to_owned(), device.to_string());
        }
        let number = meta.rdev();
        let folder = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
        if let Ok(folder) = fs::canonicalize(folder) {
            collect(&folder, "", &mut ids);
            if let Some(partition) = read_id(&folder.join("partition")) {
                ids.insert("partition".to_owned(), partition);
                if let Some(disk) = folder.parent() {
                    collect(disk, "disk/", &mut ids);
                }
            }
        }
        Identity::Device { number, size_bytes, ids }
    }

    /// Compares what was noted with what is there `now`. Sizes are not looked at: an image may have been grown.
    pub fn is_same_thing(&self, now: &Identity) -> Sameness {
        match (self, now) {
            (
                Identity::File { device, inode, born_ns, .. },
                Identity::File { device: device_now, inode: inode_now, born_ns: born_now, .. },
            ) => {
                if inode != inode_now {
                    return Sameness::Unsure(format!("another file lies there: inode {inode_now}, noted was {inode}"));
                }
                match (born_ns, born_now) {
                    (Some(born), Some(now)) if born == now => Sameness::Same,
                    (Some(_), Some(_)) => {
                        Sameness::Unsure(format!("another file lies there: inode {inode} was made anew since"))
                    }
                    _ if device == device_now => Sameness::Same,
                    _ => Sameness::Unsure(format!("it lies on device {device_now}, noted was {device}")),
                }
            }
            (Identity::Device { number, ids, .. }, Identity::Device { number: number_now, ids: ids_now, .. }) => {
                same_device(*number, ids, *number_now, ids_now)
            }
            (Identity::File { .. }, Identity::Device { .. }) => {
                Sameness::Unsure("a block device lies where a file lay".to_owned())
            }
            (Identity::Device { .. }, Identity::File { .. }) => {
                Sameness::Unsure("a file lies where a block device lay".to_owned())
            }
        }
    }

    /// Whether both are one inode, to act on: everything that is known is equal.
    pub(super) fn is_same_inode(&self, other: &Identity) -> bool {
        match (self, other) {
            (
                Identity::File { device, inode, born_ns, .. },
                Identity::File { device: other_device, inode: other_inode, born_ns: other_born, .. },
            ) => device == other_device && inode == other_inode && born_ns == other_born,
            _ => false,
        }
    }
}

/// The device number of a loop device's backing file: may be another after a boot, so it proves nothing by itself.
const LOOP_DEVICE: &str = "loop/device";

fn same_device(
    number: u64,
    noted: &BTreeMap<String, String>,
    number_now: u64,
    now: &BTreeMap<String, String>,
) -> Sameness {
    let mut is_known = false;
    for (name, id) in noted.iter().filter(|(name, _)| *name != LOOP_DEVICE) {
        match now.get(name) {
            Some(id_now) if id_now != id => {
                return Sameness::Other(format!("another device is behind it: {name} is {id_now}, noted was {id}"));
            }
            Some(_) => is_known |= name != "partition",
            None => {}
        }
    }
    match (noted.get(LOOP_DEVICE), now.get(LOOP_DEVICE)) {
        (Some(device), Some(device_now)) if device != device_now => {
            Sameness::Unsure(format!("the file behind it lies on device {device_now}, noted was {device}"))
        }
        (Some(_), None) | (None, Some(_)) if !is_known => {
            Sameness::Unsure("another kind of device is behind it".to_owned())
        }
        _ if is_known => Sameness::Same,
        _ => Sameness::Unsure(format!(
            "nothing names the hardware behind it (device number {}:{}, noted was {}:{})",
            libc::major(number_now),
            libc::minor(number_now),
            libc::major(number),
            libc::minor(number)
        )),
    }
}

fn collect(folder: &Path, prefix: &str, ids: &mut BTreeMap<String, String>) {
    for name in SYSFS_IDS {
        if let Some(id) = read_id(&folder.join(name)) {
            ids.insert(format!("{prefix}{name}"), id);
        }
    }
    let events = fs::read_to_string(folder.join("uevent")).unwrap_or_default();
    if let Some(id) = events.lines().find_map(|line| line.strip_prefix("PARTUUID=")) {
        ids.insert(format!("{prefix}partuuid"), id.to_owned());
    }
}

fn read_id(path: &Path) -> Option<String> {
    let id = fs::read_to_string(path).ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// Inode and device of the file behind a loop device.
fn loop_backing(fd: RawFd) -> Option<(u64, u64)> {
    // `struct loop_info64` of linux/loop.h: 232 bytes, which begin with `lo_device` and `lo_inode`.
    let mut info = [0u64; 29];
    // SAFETY: the call writes one `struct loop_info64` into a buffer of its size; other devices refuse it.
    let told = unsafe { libc::ioctl(fd, LOOP_GET_STATUS64, info.as_mut_ptr()) };
    // Drivers that answer any number with success leave it as it was.
    (told == 0 && info[1] != 0).then_some((info[1], info[0]))
}

impl Image {
    /// What names it now.
    pub fn identity(&self) -> Result<Identity, ImageError> {
        let failed = |error| self.io("examining", 0, error);
        let file = match self.file.file() {
            Ok(file) => file,
            Err(other) => {
                let stamp = other.stamp().map_err(failed)?;
                let (device, inode, size_bytes) = (stamp.device, stamp.inode, stamp.size_bytes);
                return Ok(Identity::File { device, inode, born_ns: None, size_bytes });
            }
        };
        let meta = file.metadata().map_err(failed)?;
        Ok(match self.is_block_device {
            true => Identity::of_device(&meta, file.as_raw_fd(), self.medium_bytes()?),
            false => Identity::of_file(&meta),
        })
    }
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
