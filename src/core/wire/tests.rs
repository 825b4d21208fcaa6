//! Byte-exact layouts, round trips, and hostile bytes.

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::core::frame::Frame;
use crate::core::ids::{BlockId, BlockIndex, Class, Name, Nonce};
use crate::core::manifest::{Geometry, PageId, PageIndex};

fn name() -> impl Strategy<Value = Name> + Clone {
    "[A-Za-z0-9][A-Za-z0-9._-]{0,20}".prop_map(|text| text.parse().expect("a name"))
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop::sample::select(Refusal::ALL.to_vec())
}

fn class() -> impl Strategy<Value = Class> {
    (0u8..3).prop_map(|n| Class::from_wire(n).expect("0 to 2"))
}

fn control() -> impl Strategy<Value = Control> {
    let geometry = (1u64..1 << 40, 14u32..=20).prop_map(|(s, b)| Geometry::new(s, 1 << b).expect("in range"));
    let want = (any::<u64>(), any::<u32>(), class(), any::<u64>()).prop_map(|(flight, handle, class, block)| Want {
        flight,
        handle,
        class,
        block: BlockIndex(block),
    });
    let question = || (any::<u32>(), any::<u64>(), name());
    let nonce = any::<[u8; 16]>().prop_map(Nonce);
    prop_oneof![
        (any::<u16>(), any::<u16>(), name(), nonce.clone(), nonce).prop_map(
            |(min_version, max_version, site, last, next)| Control::Hello {
                min_version,
                max_version,
                site,
                last,
                next
            }
        ),
        (any::<u32>(), name()).prop_map(|(request, volume)| Control::Open { request, volume }),
        (question(), any::<bool>()).prop_map(|((request, epoch, volume), take)| Control::TakeOver {
            request,
            epoch,
            take,
            volume
        }),
        (any::<u64>(), any::<u32>(), any::<u64>(), any::<u32>()).prop_map(|(flight, handle, first, count)| {
            Control::Roots { flight, handle, first: PageIndex(first), count }
        }),
        (any::<u64>(), any::<u32>(), any::<u64>()).prop_map(|(flight, handle, page)| Control::Page {
            flight,
            handle,
            page: PageIndex(page)
        }),
        prop::collection::vec(want, 0..50).prop_map(Control::Wants),
        (any::<u64>(), class()).prop_map(|(flight, class)| Control::Promote { flight, class }),
        any::<u64>().prop_map(|flight| Control::Forget { flight }),
        question().prop_map(|(request, epoch, volume)| Control::Completed { request, epoch, volume }),
        question().prop_map(|(request, epoch, volume)| Control::GiveBack { request, epoch, volume }),
        any::<u32>().prop_map(|handle| Control::Close { handle }),
        question().prop_map(|(request, epoch, volume)| Control::Reclaimed { request, epoch, volume }),
        (any::<u16>(), name()).prop_map(|(version, site)| Control::Welcome { version, site }),
        (refusal(), "[a-zä ]{0,40}").prop_map(|(refusal, why)| Control::Unwelcome { refusal, why }),
        (any::<u32>(), any::<u32>(), geometry, any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
            |(request, handle, geometry, generation, epoch, is_read_only)| {
                Control::Opened { request, handle, geometry, generation, epoch, is_read_only }
            }
        ),
        (any::<u32>(), any::<u64>()).prop_map(|(request, epoch)| Control::Done { request, epoch }),
        (any::<u32>(), refusal(), any::<u64>(), "[a-zä ]{0,40}")
            .prop_map(|(request, refusal, epoch, why)| Control::Refused { request, refusal, epoch, why }),
    ]
}

fn data() -> impl Strategy<Value = Data> {
    let frame = prop::collection::vec(any::<u8>(), 1..4096).prop_map(|raw| Frame::encode(&Bytes::from(raw), 1));
    let hash = any::<[u8; 32]>().prop_filter("not the zero flag", |hash| *hash != [0; 32]);
    let entry = prop_oneof![
        Just(RootEntry::Unknown),
        Just(RootEntry::Zero),
        any::<[u8; 32]>().prop_map(|hash| RootEntry::Known(PageId(hash)))
    ];
    prop_oneof![
        (any::<u64>(), hash, frame.clone()).prop_map(|(flight, hash, frame)| Data::Block {
            flight,
            id: BlockId(hash),
            frame: Some(frame)
        }),
        any::<u64>().prop_map(|flight| Data::Block { flight, id: BlockId::ZERO, frame: None }),
        (any::<u64>(), refusal(), "[a-z ]{0,40}").prop_map(|(flight, refusal, why)| Data::Failed {
            flight,
            refusal,
            why
        }),
        (any::<u64>(), any::<u64>(), frame).prop_map(|(flight, page, frame)| Data::Page {
            flight,
            page: PageIndex(page),
            frame
        }),
        (any::<u64>(), any::<u64>(), prop::collection::vec(entry, 0..100))
            .prop_map(|(flight, first, entries)| Data::Roots { flight, first: PageIndex(first), entries }),
    ]
}

proptest! {
    #[test]
    fn control_frames_survive_their_bytes(frame in control(), cut in any::<prop::sample::Index>()) {
        let bytes = frame.encode();
        prop_assert_eq!(Control::decode(bytes.clone()), Ok(frame));
        let short = bytes.slice(..cut.index(bytes.len()));
        prop_assert!(Control::decode(short).is_err(), "a cut frame is no frame");
        let long: Bytes = [&bytes[..], &[0]].concat().into();
        prop_assert!(Control::decode(long).is_err(), "a frame with a tail is no frame");
    }

    #[test]
    fn data_messages_survive_their_bytes(message in data()) {
        let bytes: Bytes = message.encode().concat().into();
        prop_assert_eq!(Data::decode(bytes), Ok(message));
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Control::decode(bytes.clone().into());
        let _ = Data::decode(bytes.into());
    }
}

#[test]
fn layouts_are_what_the_document_says() {
    let want = Want { flight: 0x0102030405060708, handle: 9, class: Class::Bulk, block: BlockIndex(0x0a) };
    let bytes = Control::Wants(vec![want]).encode();
    assert_eq!(hex::encode(&bytes), "140100080706050403020109000000020a00000000000000");
    let site = "ab".parse().expect("a name");
    let hello = Control::Hello { min_version: 1, max_version: 2, site, last: Nonce([3; 16]), next: Nonce([4; 16]) };
    let nonces = format!("{}{}", "03".repeat(16), "04".repeat(16));
    assert_eq!(hex::encode(hello.encode()), format!("01424652590100020002006162{nonces}"));
    let zero = Data::Block { flight: 1, id: BlockId::ZERO, frame: None };
    assert_eq!(hex::encode(zero.encode().concat()), format!("010100000000000000{}", "00".repeat(32)));
}

#[test]
fn the_newest_common_version_is_chosen() {
    assert_eq!(choose_version(2, 2), Some(2));
    assert_eq!(choose_version(1, 9), Some(*VERSIONS.end()));
    assert_eq!(choose_version(1, 1), None);
    assert_eq!(choose_version(3, 9), None);
    assert_eq!(choose_version(5, 1), None);
}

#[test]
fn flags_of_later_versions_are_errors() {
    let take_over = Control::TakeOver { request: 1, epoch: 2, take: true, volume: "vm".parse().expect("a name") };
    let mut bytes = take_over.encode().to_vec();
    for flags in 2..=255 {
        bytes[13] = flags;
        let error = Control::decode(Bytes::copy_from_slice(&bytes));
        assert_eq!(error, Err(WireError::BadField { frame: "TakeOver", field: "flags" }), "{flags}");
    }
}

#[test]
fn every_refusal_has_its_number_and_says_whether_to_ask_again() {
    for (at, refusal) in Refusal::ALL.into_iter().enumerate() {
        assert_eq!(refusal as usize, at + 1);
        assert_eq!(Refusal::from_wire(refusal as u16), Some(refusal));
    }
    assert_eq!(Refusal::from_wire(0), None);
    assert_eq!(Refusal::from_wire(14), None);
    for refusal in [Refusal::Clone, Refusal::InUse, Refusal::Reclaimed, Refusal::Withdrawn] {
        assert!(!refusal.is_transient(), "{refusal:?}");
    }
}
