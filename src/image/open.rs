//! Opening and creating images, with the checks that keep two writers from one file.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::backend::Medium;
use super::{Image, ImageError};

impl Image {
    /// Opens an image that nobody will write through this handle.
    pub fn open_read(path: &Path) -> Result<Image, ImageError> {
        let file = open(path, OpenOptions::new().read(true), "reading")?;
        Image::examine(file, path, false)
    }

    /// Opens an image for reading and writing and takes an advisory lock (flock) that keeps other blockferry daemons
    /// away. An image that QEMU has open is refused, too.
    pub fn open_write(path: &Path) -> Result<Image, ImageError> {
        let file = open(path, OpenOptions::new().read(true).write(true), "writing")?;
        let image = Image::examine(file, path, true)?;
        image.lock()?;
        Ok(image)
    }

    /// Makes the sparse file that a relocation fills. A regular file that exists is refused, unless it holds nothing and is empty or of
    /// this very size: a crash leaves such a one behind between this call and the note of what it is for. A block
    /// device is taken when it is large enough and not in use.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Image, ImageError> {
        match std::fs::metadata(path).map(|meta| meta.file_type()) {
            Ok(kind) if kind.is_block_device() => return Image::take_device(path, size_bytes),
            Ok(kind) if !kind.is_file() => return Err(ImageError::Exists { path: path.to_owned() }),
            _ => {}
        }
        let exists = || ImageError::Exists { path: path.to_owned() };
        let mut options = OpenOptions::new().read(true).write(true).to_owned();
        let (file, is_new) = match open(path, options.create_new(true), "writing") {
            Err(ImageError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                (open(path, options.create_new(false), "writing").map_err(|_| exists())?, false)
            }
            made => (made?, true),
        };
        let len_bytes = file.metadata().map(|meta| meta.len()).unwrap_or(u64::MAX);
        let file = Medium::File(file);
        let image = Image { file, path: path.to_owned(), size_bytes, is_block_device: false, is_writable: true };
        image.lock()?;
        let holds_nothing = len_bytes == 0 || len_bytes == size_bytes && image.next_data(0)?.is_none();
        if !is_new && !holds_nothing {
            return Err(exists());
        }
        let made = image.file.make(size_bytes).and_then(|()| {
            // The name has to survive a power loss as well as the content does.
            match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                Some(folder) => File::open(folder)?.sync_all(),
                None => File::open(".")?.sync_all(),
            }
        });
        if let Err(source) = made {
            if is_new {
                let _ = std::fs::remove_file(path);
            }
            return Err(ImageError::Io { doing: "creating", path: path.to_owned(), offset: size_bytes, source });
        }
        Ok(image)
    }

    fn take_device(path: &Path, size_bytes: u64) -> Result<Image, ImageError> {
        // O_EXCL without O_CREAT on a block device: "in use" (mounted, part of an array) gives EBUSY.
        let options = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_EXCL).to_owned();
        let image = Image::examine(open(path, &options, "writing")?, path, true)?;
        if image.size_bytes < size_bytes {
            return Err(ImageError::TooSmall {
                path: path.to_owned(),
                have_bytes: image.size_bytes,
                need_bytes: size_bytes,
            });
        }
        image.lock()?;
        Ok(Image { size_bytes, ..image })
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
            use std::os::unix::fs::FileExt;
            if file.read_exact_at(&mut magic, 0).is_ok() && (magic == *b"QFI\xfb" || magic == *b"KDMV") {
                return Err(not_an_image("is a qcow2 or vmdk container, not a raw image (qemu-img convert makes one)"));
            }
        }
        let file = Medium::File(file);
        Ok(Image { file, path: path.to_owned(), size_bytes, is_block_device: kind.is_block_device(), is_writable })
    }

    /// flock against other daemons; the locks of QEMU (open file description locks) are looked at, not taken, so that
    /// `qemu-img` may still read what we serve.
    fn lock(&self) -> Result<(), ImageError> {
        let in_use = |holder: String| ImageError::InUse { path: self.path.clone(), holder };
        // SAFETY: flock only reads the descriptor, which `self.file` keeps open during the call.
        let locked = unsafe { nix::libc::flock(self.file.as_raw_fd(), nix::libc::LOCK_EX | nix::libc::LOCK_NB) };
        if locked != 0 {
            return Err(in_use("it holds a lock on the file".into()));
        }
        match foreign_lock(self.file.as_raw_fd()) {
            Some(pid) if pid > 0 => Err(in_use(format!("process {pid}"))),
            Some(_) => Err(in_use("it holds a lock on the file, as QEMU does".into())),
            None => Ok(()),
        }
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
