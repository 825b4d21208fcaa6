//! A model of bytes beside the real file: what the guest wrote must survive every order of landing and zeroing.

use proptest::prelude::*;

use super::*;

const BLOCK: u64 = 16384;
const BLOCKS: u64 = 6;
const SIZE: u64 = (BLOCKS - 1) * BLOCK + 1536;

#[derive(Debug, Clone)]
enum Step {
    Write { sector: u64, sectors: u64, fill: u8 },
    Land { block: u64 },
    Zero { first: u64, count: u64, may_punch: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = SIZE / 512;
    prop_oneof![
        4 => (0..sectors, 1u64..64, 1u8..=255).prop_map(|(sector, sectors, fill)| Step::Write { sector, sectors, fill }),
        3 => (0..BLOCKS).prop_map(|block| Step::Land { block }),
        1 => (0..BLOCKS, 1u64..4, any::<bool>()).prop_map(|(first, count, may_punch)| Step::Zero { first, count, may_punch }),
    ]
}

/// What the source has: odd blocks are data, even ones zero.
fn source_byte(at: u64) -> u8 {
    if (at / BLOCK) % 2 == 1 { (at % 251) as u8 } else { 0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_read_sees_the_guests_bytes_over_the_sources(steps in prop::collection::vec(step(), 1..60), has_residue in any::<bool>()) {
        let dir = tempfile::tempdir().expect("a folder");
        let geometry = Geometry::new(SIZE, BLOCK).expect("a geometry");
        let image = Arc::new(Image::create(&dir.path().join("d"), SIZE, crate::image::Overwrite::OnlyBlank).expect("creates"));
        if has_residue {
            image.write_at(0, &vec![0xee; SIZE as usize]).expect("writes");
        }
        let disk = Disk::new(image, Residency::new(geometry), geometry, Life::new("vm".parse().expect("a name")), has_residue);
        let source: Vec<u8> = (0..SIZE).map(source_byte).collect();
        let mut model = source.clone();
        for step in steps {
            match step {
                Step::Write { sector, sectors, fill } => {
                    let (start, end) = (sector * 512, ((sector + sectors) * 512).min(SIZE));
                    model[start as usize..end as usize].fill(fill);
                    for block in disk.blocks_of(start, end - start) {
                        let block = BlockIndex(block);
                        let within = disk.within(block, start, end - start);
                        prop_assert!(disk.is_sector_aligned(block, &within));
                        disk.write(block, within.start, &vec![fill; within.len()]).expect("writes");
                    }
                }
                Step::Land { block } => {
                    let block = BlockIndex(block);
                    let first = geometry.offset_of(block) as usize;
                    let bytes = &source[first..first + geometry.len_of(block) as usize];
                    if crate::core::ids::is_zero(bytes) {
                        disk.land_zeros(&[block]).expect("lands");
                    } else {
                        disk.land(block, bytes).expect("lands");
                    }
                    prop_assert!(disk.bits().is_resident(block));
                }
                Step::Zero { first, count, may_punch } => {
                    let end = (first + count).min(BLOCKS);
                    disk.zero_blocks(first..end, may_punch).expect("zeroes");
                    model[(first * BLOCK) as usize..(end * BLOCK).min(SIZE) as usize].fill(0);
                }
            }
        }
        for block in 0..BLOCKS {
            let block = BlockIndex(block);
            let first = geometry.offset_of(block) as usize;
            let len = geometry.len_of(block);
            let base = &source[first..first + len as usize];
            let mut out = vec![1; len as usize];
            disk.read_over(block, 0..len, Some(base), &mut out).expect("reads");
            prop_assert_eq!(&out[..], &model[first..first + len as usize], "block {}", block.0);
        }
    }
}

/// A file in memory that is full behind a byte: what is written over that ends there, with an error.
#[derive(Debug)]
struct Full {
    bytes: parking_lot::Mutex<Vec<u8>>,
    full_from: usize,
}

impl crate::image::Backend for Full {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        buf.copy_from_slice(&self.bytes.lock()[offset as usize..][..buf.len()]);
        Ok(buf.len())
    }
    fn read_cached_at(&self, _: &mut [u8], _: u64) -> Option<std::io::Result<()>> {
        None
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let fits = self.full_from.saturating_sub(offset as usize).min(bytes.len());
        self.bytes.lock()[offset as usize..][..fits].copy_from_slice(&bytes[..fits]);
        if fits == bytes.len() { Ok(()) } else { Err(std::io::ErrorKind::StorageFull.into()) }
    }
    fn write_zeroes(&self, offset: u64, len_bytes: u64, _: bool) -> std::io::Result<()> {
        self.bytes.lock()[offset as usize..][..len_bytes as usize].fill(0);
        Ok(())
    }
    fn sync_data(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn next_data(&self, from: u64) -> std::io::Result<Option<Range<u64>>> {
        let bytes = self.bytes.lock();
        let at = bytes[from as usize..].iter().position(|byte| *byte != 0);
        Ok(at.map(|at| from + at as u64..bytes.len() as u64))
    }
    fn stamp(&self) -> std::io::Result<crate::image::Stamp> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn allocated_bytes(&self) -> std::io::Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }
}

/// A new file has no residue, until a guest's write fails in the middle: its error says that nothing is promised of these sectors, and
/// still they must not change by themselves.
#[test]
fn what_a_failed_write_left_does_not_show_through_a_zero_block() {
    let geometry = Geometry::new(SIZE, BLOCK).expect("a geometry");
    let full = Full { bytes: parking_lot::Mutex::new(vec![0; SIZE as usize]), full_from: 4096 };
    let image = Arc::new(Image::over(Box::new(full), std::path::Path::new("full"), SIZE, true));
    let life = Life::new("vm".parse().expect("a name"));
    let disk = Disk::new(image, Residency::new(geometry), geometry, life, false);
    disk.write(BlockIndex(0), 0, &[7; BLOCK as usize]).expect_err("there is no room");
    let read = || {
        let mut out = vec![1; BLOCK as usize];
        disk.read_over(BlockIndex(0), 0..BLOCK as u32, None, &mut out).expect("reads");
        out
    };
    let before = read();
    assert_eq!(disk.land_zeros(&[BlockIndex(0)]).expect("lands"), BLOCK);
    assert!(read() == before && crate::core::ids::is_zero(&before));
}
