//! What comes from another site, and residency rows: whatever the bytes, parsing does not panic, and what it takes is written
//! again byte for byte. So nothing that is parsed is larger than its bytes. Must not know who sends or keeps them.

use bytes::Bytes;

use crate::core::frame::{Frame, MAX_RAW_BYTES};
use crate::core::manifest::Geometry;
use crate::core::residency::Residency;
use crate::core::wire::{Control, Data};

/// A control frame.
pub fn control(bytes: &[u8]) {
    if let Ok(frame) = Control::decode(Bytes::copy_from_slice(bytes)) {
        assert_eq!(frame.encode(), bytes, "{frame:?}");
    }
}

/// A data message.
pub fn data(bytes: &[u8]) {
    let reserved = Data::raw_len_bytes(bytes) as usize;
    assert!(reserved >= bytes.len() && reserved <= bytes.len().max(MAX_RAW_BYTES as usize));
    if let Ok(message) = Data::decode(Bytes::copy_from_slice(bytes)) {
        assert_eq!(message.encode().concat(), bytes, "{message:?}");
        if let Data::Block { frame: Some(frame), .. } | Data::Page { frame, .. } = message {
            expand(&frame);
        }
    }
}

/// A frame, as it is stored and sent.
pub fn frame(bytes: &[u8]) {
    if let Ok(frame) = Frame::from_bytes(&Bytes::copy_from_slice(bytes)) {
        assert_eq!(frame.to_bytes(), bytes);
        expand(&frame);
    }
}

fn expand(frame: &Frame) {
    if let Ok(raw) = frame.decode() {
        assert_eq!(raw.len(), frame.raw_len_bytes as usize);
        assert!(raw.len() <= MAX_RAW_BYTES as usize);
    }
}

/// A row of residency, of volumes whose last chunk and last block are whole or not.
pub fn residency(bytes: &[u8]) {
    for (size_bytes, chunk) in
        [(3 * 16384 + 8192, 0), (256 * 16384, 0), (300 * 16384 + 1, 1), (16384, 1), (1, u64::MAX)]
    {
        let geometry = Geometry::new(size_bytes, 16384).expect("a geometry");
        let mut restored = Residency::new(geometry);
        if restored.restore_chunk(chunk, bytes).is_ok() {
            let row = restored.chunk_row(chunk);
            let mut again = Residency::new(geometry);
            again.restore_chunk(chunk, &row).expect("its own row");
            assert_eq!(again.chunk_row(chunk), row);
            assert!(row.len() <= bytes.len(), "a row grows from {} to {} bytes", bytes.len(), row.len());
        }
    }
}
