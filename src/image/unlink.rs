//! Removing the file that was made for a volume, and no other that has its name by then. Must not know why it is removed.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{Identity, Image, ImageError};

/// The folder in which a file was made, whatever it is called by now, and the file's name there.
#[derive(Debug)]
pub(super) struct Place {
    folder: File,
    name: OsString,
}

/// What became of a file that was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlinked {
    /// It is gone.
    Done,
    /// It was there before the volume came (or is a device), and stays.
    NotMade,
    /// Nothing has its name: it was removed or renamed by somebody.
    NotThere,
    /// Another file has its name, and stays, as it does wherever it is by now.
    Another,
}

impl Place {
    pub(super) fn of(path: &Path) -> io::Result<Place> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let options = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).to_owned();
        Ok(Place { folder: options.open(folder)?, name })
    }

    /// Makes the name survive a power loss, as a sync does for the content.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.folder.sync_all()
    }

    /// What has the name now; a link is not followed.
    fn look(&self) -> io::Result<Option<Identity>> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&self.folder, OsStr::new(&self.name), flags, Mode::empty()) {
            Ok(there) => Ok(Some(Identity::of_file(&File::from(there).metadata()?))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes the name if it is `ours`.
    pub(super) fn unlink(&self, ours: &Identity) -> io::Result<Unlinked> {
        match self.look()? {
            None => Ok(Unlinked::NotThere),
            Some(there) if !there.is_same_inode(ours) => Ok(Unlinked::Another),
            Some(_) => {
                unlinkat(self.folder.as_fd(), OsStr::new(&self.name), UnlinkatFlags::NoRemoveDir)?;
                Ok(Unlinked::Done)
            }
        }
    }
}

impl Image {
    /// Removes the file, if [`Image::create`] made it and its name, in the folder where it was made, is still its own.
    pub fn unlink_if_ours(&self) -> Result<Unlinked, ImageError> {
        match &self.made_at {
            None => Ok(Unlinked::NotMade),
            Some(place) => place.unlink(&self.identity()?).map_err(|error| self.io("removing", 0, error)),
        }
    }

    /// The same from a record: removes the file at `path` if it is the one that was noted. For what was made here only.
    pub fn unlink_known(path: &Path, noted: &Identity) -> Result<Unlinked, ImageError> {
        if matches!(noted, Identity::Device { .. }) {
            return Ok(Unlinked::NotMade);
        }
        let removed = Place::of(path).and_then(|place| place.unlink(noted));
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Unlinked::NotThere),
            removed => {
                removed.map_err(|source| ImageError::Io { doing: "removing", path: path.to_owned(), offset: 0, source })
            }
        }
    }
}
