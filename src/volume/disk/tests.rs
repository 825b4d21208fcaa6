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
        let image = Arc::new(Image::create(&dir.path().join("d"), SIZE).expect("creates"));
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
