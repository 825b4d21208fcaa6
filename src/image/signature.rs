//! What a block device holds, by the signatures of file systems, partition tables and the like. Must not know what becomes of it.

use std::io;

/// A signature: what it stands for, where it lies, and its bytes.
type Magic = (&'static str, u64, &'static [u8]);

/// From libblkid's `superblocks/` and the formats' own headers.
const MAGICS: &[Magic] = &[
    ("an ext2, ext3 or ext4 file system", 0x438, b"\x53\xef"),
    ("an XFS file system", 0, b"XFSB"),
    ("a Btrfs file system", 0x10040, b"_BHRfS_M"),
    ("an F2FS file system", 0x400, b"\x10\x20\xf5\xf2"),
    ("a bcachefs or bcache device", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("a bcachefs device", 0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("a LUKS container", 0, b"LUKS\xba\xbe"),
    ("a LUKS container (its second header)", 0x4000, b"SKUL\xba\xbe"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 0x52, b"FAT32   "),
    ("a FAT file system", 0x36, b"FAT16   "),
    ("a FAT file system", 0x36, b"FAT12   "),
    ("a FAT file system", 0x36, b"FAT     "),
    ("an ISO 9660 file system", 0x8001, b"CD001"),
    ("a UDF file system", 0x8001, b"BEA01"),
    ("a squashfs file system", 0, b"hsqs"),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a VMDK image", 0, b"KDMV"),
    ("a BitLocker volume", 3, b"-FVE-FS-"),
    ("a part of a RAID (md, version 1.1)", 0, b"\xfc\x4e\x2b\xa9"),
    ("a part of a RAID (md, version 1.2)", 0x1000, b"\xfc\x4e\x2b\xa9"),
];

/// Sizes of memory pages: swap's signature ends the first one.
const PAGE_BYTES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];

/// Sectors of a disk: GPT's headers lie in the second and in the last.
const SECTOR_BYTES: [u64; 2] = [512, 4096];

/// A ZFS label: four of them, two at each end.
const ZFS_LABEL_BYTES: u64 = 256 << 10;
/// Of an uberblock, in either order of bytes.
const ZFS_MAGICS: [[u8; 8]; 2] = [0x00ba_b10c_u64.to_le_bytes(), 0x00ba_b10c_u64.to_be_bytes()];

/// The first signature that is found, and in words what it stands for; None for a device that looks blank. `read` fills its buffer from an
/// offset, and is never asked for bytes behind `size_bytes`.
pub(super) fn find(
    size_bytes: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Option<&'static str>> {
    let mut is_at = |offset: u64, magic: &[u8]| -> io::Result<bool> {
        if offset.checked_add(magic.len() as u64).is_none_or(|end| end > size_bytes) {
            return Ok(false);
        }
        let mut found = [0; 16];
        let found = &mut found[..magic.len()];
        read(offset, found)?;
        Ok(found == magic)
    };
    for (what, offset, magic) in MAGICS {
        if is_at(*offset, magic)? {
            return Ok(Some(what));
        }
    }
    for sector in SECTOR_BYTES {
        if is_at(sector, b"EFI PART")? || is_at(size_bytes.saturating_sub(sector), b"EFI PART")? {
            return Ok(Some("a partition table (GPT)"));
        }
    }
    for sector in 0..4 {
        if is_at(sector * 512, b"LABELONE")? && is_at(sector * 512 + 24, b"LVM2 001")? {
            return Ok(Some("a physical volume of LVM"));
        }
    }
    for page in PAGE_BYTES {
        if is_at(page - 10, b"SWAPSPACE2")? || is_at(page - 10, b"SWAP-SPACE")? {
            return Ok(Some("swap space"));
        }
    }
    // Version 1.0: at least 8 KiB before the end, aligned to 4 KiB. Version 0.90: in the last whole 64 KiB but one.
    let at_end = size_bytes.checked_sub(8 << 10).map(|at| at - at % 4096);
    let before_end = (size_bytes - size_bytes % (64 << 10)).checked_sub(64 << 10);
    for at in [at_end, before_end].into_iter().flatten() {
        if is_at(at, b"\xfc\x4e\x2b\xa9")? || is_at(at, b"\xa9\x2b\x4e\xfc")? {
            return Ok(Some("a part of a RAID (md)"));
        }
    }
    let labels_end = size_bytes - size_bytes % ZFS_LABEL_BYTES;
    let labels = [
        Some(0),
        Some(ZFS_LABEL_BYTES),
        labels_end.checked_sub(2 * ZFS_LABEL_BYTES),
        labels_end.checked_sub(ZFS_LABEL_BYTES),
    ];
    for label in labels.into_iter().flatten() {
        // The uberblocks are the label's second half, at least 1 KiB each.
        for uberblock in 0..128 {
            let at = label + ZFS_LABEL_BYTES / 2 + uberblock * 1024;
            if is_at(at, &ZFS_MAGICS[0])? || is_at(at, &ZFS_MAGICS[1])? {
                return Ok(Some("a part of a ZFS pool"));
            }
        }
    }
    // The last: boot sectors of file systems end alike.
    if is_at(510, b"\x55\xaa")? {
        return Ok(Some("a partition table or a boot sector (MBR)"));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it is called, and the bytes that tell it, each at its offset.
    type Signature = (&'static str, &'static [(u64, &'static [u8])]);

    fn found(size_bytes: u64, parts: &[(u64, &[u8])]) -> Option<&'static str> {
        let mut disk = vec![0u8; size_bytes as usize];
        for (at, bytes) in parts {
            disk[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
        }
        let read = |offset: u64, buf: &mut [u8]| {
            let from = offset as usize;
            buf.copy_from_slice(disk.get(from..from + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        find(size_bytes, read).expect("never reads behind the end")
    }

    #[test]
    fn each_signature_is_found_and_a_blank_device_has_none() {
        const SIZE: u64 = 2 << 20;
        for (what, offset, magic) in MAGICS {
            assert_eq!(found(SIZE, &[(*offset, magic)]), Some(*what));
        }
        let others: [Signature; 13] = [
            ("GPT", &[(512, b"EFI PART")]),
            ("GPT", &[(4096, b"EFI PART")]),
            ("GPT", &[(SIZE - 512, b"EFI PART")]),
            ("GPT", &[(SIZE - 4096, b"EFI PART")]),
            ("MBR", &[(510, b"\x55\xaa")]),
            ("LVM", &[(512, b"LABELONE"), (536, b"LVM2 001")]),
            ("LVM", &[(1536, b"LABELONE"), (1560, b"LVM2 001")]),
            ("swap", &[(4086, b"SWAPSPACE2")]),
            ("swap", &[(65526, b"SWAPSPACE2")]),
            ("RAID", &[(SIZE - 8192, b"\xfc\x4e\x2b\xa9")]),
            ("RAID", &[(SIZE - 65536, b"\xfc\x4e\x2b\xa9")]),
            ("ZFS", &[(128 << 10, b"\x0c\xb1\xba\0\0\0\0\0")]),
            ("ZFS", &[(SIZE - (128 << 10) + 3072, b"\0\0\0\0\0\xba\xb1\x0c")]),
        ];
        for (word, parts) in others {
            let what = found(SIZE, parts).unwrap_or_else(|| panic!("{word} is not found"));
            assert!(what.contains(word), "{what} for {word}");
        }
        assert_eq!(found(SIZE, &[(100_000, b"some of a guest's bytes")]), None);
        for size in [0, 1, 511, 512, 4096, 65536, 100_001, SIZE + 512] {
            assert_eq!(found(size, &[]), None, "{size} bytes of nothing");
        }
    }
}
