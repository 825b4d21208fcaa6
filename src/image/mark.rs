//! What was noted of an image's content while it rested, and whether it may be taken for the same again.
//! Must not know volumes: who notes when, and where.

use serde::{Deserialize, Serialize};

use super::identity::{Identity, Sameness};
use super::{Image, ImageError};

/// Samples of one image at most, without the one at its end.
const SAMPLES: u64 = 64;
/// Bytes of one.
const SAMPLE_BYTES: u64 = 4096;

/// A hash over samples of an image, the first and the last of its bytes among them. It tells other content, not every change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// The part of the image that was sampled, from its beginning.
    pub size_bytes: u64,
    /// BLAKE3, in hex, of each sample's position (big endian, 64 bits) and bytes.
    pub hash: String,
}

/// What a site noted of an image when it last had it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Noted {
    /// What it was.
    pub identity: Identity,
    /// Its content, if it rested. Removed, durably, before the first write.
    pub mark: Option<Mark>,
}

/// Why an image is taken for the one that was noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the same thing.
    Same,
    /// It may be another thing, of the same content. Says what is unlike what was noted.
    SameContent(String),
}

/// Why an image is not taken for the one that was noted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WhyNot {
    /// Another thing.
    #[error("{0}")]
    Another(String),
    /// It holds something else.
    #[error("it holds other content than when this site last had it{}", because(.0))]
    OtherContent(Option<String>),
    /// It may be another, and there is nothing to tell by.
    #[error("{0}, and what it held is not known, since it was in use when this site last had it")]
    Unproven(String),
    /// It was not looked at.
    #[error("its content was not compared")]
    NotCompared,
}

fn because(why: &Option<String>) -> String {
    why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default()
}

/// Decides whether an image is the one that was noted. `mark` is what its content is now; it may be left out where none was noted.
pub fn judge(noted: &Noted, now: &Identity, mark: Option<&Mark>) -> Result<Verdict, WhyNot> {
    let unlike = match noted.identity.is_same_thing(now) {
        Sameness::Same => None,
        Sameness::Unsure(why) => Some(why),
        Sameness::Other(why) => return Err(WhyNot::Another(why)),
    };
    match (&noted.mark, mark, unlike) {
        (None, _, None) => Ok(Verdict::Same),
        (None, _, Some(why)) => Err(WhyNot::Unproven(why)),
        (Some(_), None, _) => Err(WhyNot::NotCompared),
        (Some(noted), Some(now), unlike) if noted != now => Err(WhyNot::OtherContent(unlike)),
        (Some(_), Some(_), None) => Ok(Verdict::Same),
        (Some(_), Some(_), Some(why)) => Ok(Verdict::SameContent(why)),
    }
}

impl Mark {
    /// Reads the samples of the first `size_bytes` of an image. Blocking: up to 65 small reads.
    pub fn take(image: &Image, size_bytes: u64) -> Result<Mark, ImageError> {
        let mut hasher = blake3::Hasher::new();
        let mut buf = vec![0; SAMPLE_BYTES as usize];
        for offset in positions(size_bytes) {
            let len = (size_bytes - offset).min(SAMPLE_BYTES) as usize;
            image.read_at(offset, &mut buf[..len])?;
            hasher.update(&offset.to_be_bytes());
            hasher.update(&buf[..len]);
        }
        Ok(Mark { size_bytes, hash: hasher.finalize().to_hex().to_string() })
    }
}

/// Where the samples begin, in order: aligned, except for the last of an odd size.
fn positions(size_bytes: u64) -> Vec<u64> {
    let last = size_bytes.saturating_sub(SAMPLE_BYTES);
    let mut positions: Vec<u64> = (0..SAMPLES)
        .map(|nth| {
            let at = (u128::from(last) * u128::from(nth) / u128::from(SAMPLES - 1)) as u64;
            at - at % SAMPLE_BYTES
        })
        .collect();
    positions.push(last);
    positions.dedup();
    positions
}

impl Image {
    /// What is to be remembered of it; with its content if it rests. The caller has synced it.
    pub fn note(&self, is_resting: bool) -> Result<Noted, ImageError> {
        let mark = is_resting.then(|| Mark::take(self, self.size_bytes())).transpose()?;
        Ok(Noted { identity: self.identity()?, mark })
    }

    /// Whether it is the image that was noted. Looks at its content only where that was noted.
    pub fn recognise(&self, noted: &Noted) -> Result<Verdict, ImageError> {
        let now = self.identity()?;
        let mark = noted.mark.as_ref().map(|mark| mark.size_bytes.min(self.size_bytes()));
        let mark = mark.map(|size_bytes| Mark::take(self, size_bytes)).transpose()?;
        judge(noted, &now, mark.as_ref()).map_err(|why| ImageError::NotTheSame { path: self.path().to_owned(), why })
    }
}

#[cfg(test)]
#[path = "mark_tests.rs"]
mod tests;
