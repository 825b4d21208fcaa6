//! Opening and creating images, with the checks that keep two writers from one file.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::RawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::backend::Medium;
use super::claim::Claim;
use super::unlink::Place;
use super::{Image, ImageError, signature};

/// Whether a device's content may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Only a device that looks blank is taken.
    OnlyBlank,
    /// A person said so.
    Anything,
}

impl Image {
    /// Opens an image that nobody will write through this handle. Whoever uses it may go on doing so.
    pub fn open_read(path: &Path) -> Result<Image, ImageError> {
        let file = open(path, OpenOptions::new().read(true), "reading")?;
        Image::examine(file, path, false)
    }

    /// Opens an image for reading and writing and takes an advisory lock (flock) that keeps other blockferry daemons
    /// away. An image that QEMU has open is refused, too, and so is a block device that the kernel uses.
    pub fn open_write(path: &Path) -> Result<Image, ImageError> {
        let file = open(path, OpenOptions::new().read(true).write(true).custom_flags(exclusive(path)), "writing")?;
        Image::examine(file, path, true)?.lock()
    }

    /// For writing where that is allowed, for reading otherwise, and then with the reason ([`Image::read_only_why`]): a template on a
    /// read-only disk can be a source, too.
    pub fn open_best(path: &Path) -> Result<Image, ImageError> {
        let why = match Image::open_write(path) {
            Err(ImageError::Unreadable { source, .. })
                if matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) =>
            {
                source
            }
            opened => return opened,
        };
        // Somebody's writes to a device would show in what is served, so it has to be free for reading as well.
        let file = open(path, OpenOptions::new().read(true).custom_flags(exclusive(path)), "reading")?;
        let image = Image::examine(file, path, false)?;
        Ok(Image { read_only_why: Some(format!("it cannot be opened for writing: {why}")), ..image })
    }

    /// As [`Image::open_best`], for a volume of `size_bytes`: what is larger is clipped to that, what is smaller refused.
    pub fn open_known(path: &Path, size_bytes: u64) -> Result<Image, ImageError> {
        Image::open_best(path)?.clipped(size_bytes)
    }

    /// The first `size_bytes` of it: what lies behind them is neither read nor written.
    pub fn clipped(self, size_bytes: u64) -> Result<Image, ImageError> {
        if self.size_bytes < size_bytes {
            return Err(ImageError::TooSmall { path: self.path, have_bytes: self.size_bytes, need_bytes: size_bytes });
        }
        Ok(Image { size_bytes, ..self })
    }

    /// Makes the sparse file that a relocation fills, readable by its owner alone. A regular file that exists is refused, unless it holds
    /// nothing and is empty or of this very size: a crash leaves such a one behind between this call and the note of what it is for.
    /// A block device is taken when it is large enough, not in use, and blank (or `overwrite` says that it need not be).
    pub fn create(path: &Path, size_bytes: u64, overwrite: Overwrite) -> Result<Image, ImageError> {
        let exists = || ImageError::Exists { path: path.to_owned() };
        let is_link = || ImageError::IsLink { path: path.to_owned() };
        match std::fs::metadata(path).map(|meta| meta.file_type()) {
            Ok(kind) if kind.is_block_device() => return Image::take_device(path, size_bytes, overwrite),
            Ok(kind) if !kind.is_file() => return Err(exists()),
            _ => {}
        }
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
            return Err(is_link());
        }
        let mut options = OpenOptions::new().read(true).write(true).mode(0o600).to_owned();
        options.custom_flags(nix::libc::O_NOFOLLOW);
        let (file, is_new) = match open(path, options.create_new(true), "writing") {
            Err(ImageError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                match open(path, options.create_new(false), "writing") {
                    Err(ImageError::Unreadable { source, .. }) if source.raw_os_error() == Some(nix::libc::ELOOP) => {
                        return Err(is_link());
                    }
                    opened => (opened.map_err(|_| exists())?, false),
                }
            }
            made => (made?, true),
        };
        let failed = |source| ImageError::Io { doing: "creating", path: path.to_owned(), offset: size_bytes, source };
        let mut image = Image::new(Medium::File(file), path, size_bytes, false, true);
        let place = Place::of(path).map_err(failed)?;
        if is_new {
            image.made_at = Some(place);
        } else {
            let len_bytes = image.medium_bytes()?;
            if len_bytes != 0 && (len_bytes != size_bytes || image.next_data(0)?.is_some()) {
                // Somebody who uses it is named rather than that it exists.
                image.lock()?;
                return Err(exists());
            }
        }
        let image = image.lock()?;
        let made = image.file.make(size_bytes, is_new).and_then(|()| match &image.made_at {
            Some(place) => place.sync(),
            None => Place::of(path)?.sync(),
        });
        if let Err(source) = made {
            let _ = image.unlink_if_ours();
            return Err(failed(source));
        }
        Ok(image)
    }

    fn take_device(path: &Path, size_bytes: u64, overwrite: Overwrite) -> Result<Image, ImageError> {
        let image = Image::open_write(path)?;
        if overwrite == Overwrite::OnlyBlank {
            let Ok(file) = image.file.file() else { return image.clipped(size_bytes) };
            let found = signature::find(image.size_bytes, |offset, buf| file.read_exact_at(buf, offset));
            if let Some(what) = found.map_err(|error| image.io("reading", 0, error))? {
                return Err(ImageError::Signature { path: path.to_owned(), what });
            }
        }
        image.clipped(size_bytes)
    }

    fn examine(mut file: File, path: &Path, is_writable: bool) -> Result<Image, ImageError> {
        let not_an_image = |what: &str| not_an_image(path, what);
        let unreadable = |source| ImageError::Unreadable { path: path.to_owned(), purpose: "reading", source };
        let kind = file.metadata().map_err(unreadable)?.file_type();
        check_kind(kind, path)?;
        // Seeking to the end gives the size of a file and of a block device alike.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
        if size_bytes == 0 {
            return Err(not_an_image("is empty"));
        }
        if kind.is_file() {
            let mut magic = [0u8; 4];
            if file.read_exact_at(&mut magic, 0).is_ok() && (magic == *b"QFI\xfb" || magic == *b"KDMV") {
                return Err(not_an_image("is a qcow2 or vmdk container, not a raw image (qemu-img convert makes one)"));
            }
        }
        Ok(Image::new(Medium::File(file), path, size_bytes, kind.is_block_device(), is_writable))
    }

    /// Claims it against this process, flock against other daemons; the locks of QEMU (open file description locks) are looked at,
    /// not taken, so that `qemu-img` may still read what we serve.
    fn lock(mut self) -> Result<Image, ImageError> {
        let in_use = |holder: &str| ImageError::InUse { path: self.path.clone(), holder: holder.to_owned() };
        if let Ok(file) = self.file.file() {
            let meta = file.metadata().map_err(|error| self.io("examining", 0, error))?;
            // A lock belongs to a device node, and a device may have several.
            let claim = Claim::take(&meta);
            self._claim = Some(claim.ok_or_else(|| in_use("this daemon serves it, perhaps under another name"))?);
        }
        let fd = self.file.as_raw_fd();
        // SAFETY: flock only reads the descriptor, which `self.file` keeps open during the call.
        let locked = unsafe { nix::libc::flock(fd, nix::libc::LOCK_EX | nix::libc::LOCK_NB) };
        if locked != 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(nix::libc::EWOULDBLOCK) => in_use("another process holds a lock on the file"),
                _ => ImageError::NoLocks { path: self.path.clone(), source },
            });
        }
        match foreign_lock(fd) {
            Some(pid) if pid > 0 => Err(in_use(&format!("process {pid}"))),
            Some(_) => Err(in_use("another process holds a lock on the file, as QEMU does")),
            None => Ok(self),
        }
    }
}

/// What keeps the kernel's other uses away from a block device, as mkfs and mount do: without O_CREAT it means nothing else, and nothing for
/// files.
fn exclusive(path: &Path) -> i32 {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => nix::libc::O_EXCL,
        _ => 0,
    }
}

fn not_an_image(path: &Path, what: &str) -> ImageError {
    ImageError::NotAnImage { path: path.to_owned(), what: what.to_owned() }
}

fn check_kind(kind: FileType, path: &Path) -> Result<(), ImageError> {
    if kind.is_dir() {
        return Err(not_an_image(path, "is a folder"));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(not_an_image(path, "is neither a regular file nor a block device"));
    }
    Ok(())
}

fn open(path: &Path, options: &OpenOptions, purpose: &'static str) -> Result<File, ImageError> {
    // Before it is opened: a folder cannot be, a pipe may wait for its other end for ever. What is opened is looked at again.
    if let Ok(there) = std::fs::metadata(path) {
        check_kind(there.file_type(), path)?;
    }
    options.open(path).inspect(without_access_times).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound
            if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.exists()) =>
        {
            ImageError::Unreadable {
                path: path.to_owned(),
                purpose,
                source: io::Error::new(io::ErrorKind::NotFound, "its folder does not exist"),
            }
        }
        io::ErrorKind::NotFound => ImageError::Missing { path: path.to_owned() },
        io::ErrorKind::ResourceBusy => {
            ImageError::InUse { path: path.to_owned(), holder: "the kernel: mounted, or part of another device".into() }
        }
        _ => ImageError::Unreadable { path: path.to_owned(), purpose, source },
    })
}

/// Noting when a file was last read means a change of its inode, which waits for the file system's journal while that is written: a
/// guest's read must not. Only a file's owner may ask for this; others read a little slower.
fn without_access_times(file: &File) {
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    if let Ok(flags) = flags {
        let _ = fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NOATIME));
    }
}

/// The process that holds any byte-range lock on the file: -1 for an open-file-description lock (QEMU's), which has none.
fn foreign_lock(fd: RawFd) -> Option<i32> {
    // SAFETY: `flock` is plain data for which all-zero is a valid value.
    let mut lock: nix::libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = nix::libc::F_WRLCK as i16;
    lock.l_whence = nix::libc::SEEK_SET as i16;
    // SAFETY: F_OFD_GETLK reads and writes exactly one `flock`, which outlives the call.
    let asked = unsafe { nix::libc::fcntl(fd, nix::libc::F_OFD_GETLK, &mut lock) };
    (asked == 0 && lock.l_type != nix::libc::F_UNLCK as i16).then_some(lock.l_pid)
}
