//! The seam between the API and the site: what can be asked, and how a refusal looks.
//! Must not know HTTP nor sockets.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::core::ids::Name;

use super::status::{PrewarmStatus, SiteStatus, StoreStats, VolumeStatus};

/// The answer to a question.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, ApiError>>;

/// What a site can be asked. Every answer should come within [`super::REQUEST_TIMEOUT`]: long work is started here and
/// watched by its status. The future of a question that changes something is driven to its end, whatever becomes of the
/// client that asked.
pub trait Site: Send + Sync + 'static {
    /// Everything at a glance.
    fn status(&self) -> Answer<'_, SiteStatus>;
    /// One volume.
    fn volume_status(&self, name: Name) -> Answer<'_, VolumeStatus>;
    /// Takes an image into ownership and serves it.
    fn add_volume(&self, add: AddVolume) -> Answer<'_, ()>;
    /// Stops serving an image that this site owns; the image stays.
    fn remove_volume(&self, name: Name) -> Answer<'_, ()>;
    /// Begins relocations. One result for each request, in their order: the volume is owned here, or its hand-over has
    /// begun and its phase is [`super::Phase::Connecting`]. Why a hand-over was withdrawn or refused afterwards is the
    /// error of [`Site::volume_status`] for its name.
    fn relocate(&self, requests: Vec<RelocateRequest>) -> BoxFuture<'_, Vec<Result<(), ApiError>>>;
    /// Pauses a bulk copy.
    fn pause(&self, name: Name) -> Answer<'_, ()>;
    /// Lets a paused bulk copy go on.
    fn resume(&self, name: Name) -> Answer<'_, ()>;
    /// Limits a bulk copy, in bytes per second; `None` removes its limit.
    fn limit(&self, name: Name, bytes_per_s: Option<u64>) -> Answer<'_, ()>;
    /// Gives a relocation up; refused where that would lose what the guest wrote, unless told to discard it.
    fn cancel(&self, name: Name, cancel: Cancel) -> Answer<'_, CancelAnswer>;
    /// Ends a relocation without the site at its other end, which is lost for good and is fenced should it come back.
    fn reclaim(&self, name: Name, reclaim: Reclaim) -> Answer<'_, ReclaimAnswer>;
    /// Lets whichever instance of a peer comes next be the one: a person's decision, after another was turned away.
    fn accept_peer(&self, name: Name) -> Answer<'_, ()>;
    /// Begins to read images into the store.
    fn prewarm(&self, images: Vec<PathBuf>) -> Answer<'_, JobId>;
    /// How far a prewarm job is.
    fn prewarm_status(&self, job: JobId) -> Answer<'_, PrewarmStatus>;
    /// The content store.
    fn store_stats(&self) -> Answer<'_, StoreStats>;
}

/// An image to be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddVolume {
    /// What it is to be called.
    pub name: Name,
    /// An absolute path at the daemon's site.
    pub image: PathBuf,
    /// Take the name back although it left this site for another one.
    #[serde(default)]
    pub again: bool,
}

/// A volume to be brought here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelocateRequest {
    /// Where it is now.
    pub peer: Name,
    /// What it is called, there and here.
    pub volume: Name,
    /// The absolute path of the raw file to make, or of the block device to fill; without one, the site makes a file.
    #[serde(default)]
    pub image: Option<PathBuf>,
    /// Whether to copy what no guest asks for.
    #[serde(default = "yes")]
    pub bulk: bool,
    /// The most that its bulk copy may take, in bytes per second.
    #[serde(default)]
    pub bulk_rate_bytes_per_s: Option<u64>,
    /// Take it although clients are connected at the source: their writes fail from then on.
    #[serde(default)]
    pub take: bool,
    /// Overwrite what the image, a device, holds.
    #[serde(default)]
    pub overwrite: bool,
    /// How long the hand-over may take, before it is withdrawn: the source is told until it answers, and owns the volume from then on.
    /// Without one, the site chooses ([`DEFAULT_HANDOVER_TIMEOUT`]). More than 0.
    #[serde(default)]
    pub timeout_s: Option<f64>,
}

/// How long a hand-over may take that says nothing else.
pub const DEFAULT_HANDOVER_TIMEOUT: Duration = Duration::from_secs(5 * 60);

fn yes() -> bool {
    true
}

/// The body of `POST /v1/relocations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relocations {
    /// At least one.
    pub relocations: Vec<RelocateRequest>,
}

/// The answer to [`Relocations`], in their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelocationAnswers {
    /// One for each request.
    pub relocations: Vec<RelocationAnswer>,
}

/// What became of one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelocationAnswer {
    /// As asked.
    pub peer: Name,
    /// As asked.
    pub volume: Name,
    /// Why it was not begun; `None`: it was.
    pub error: Option<ApiError>,
}

/// The body of `POST /v1/volumes/NAME/limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// At least 1; `null` removes the limit.
    pub bytes_per_s: Option<u64>,
}

/// The body of `POST /v1/volumes/NAME/cancel`; no body is the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// Give the relocation up although the guest wrote here, and throw that away.
    #[serde(default)]
    pub discard_writes: bool,
}

/// The answer to [`Cancel`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelAnswer {
    /// What the guest had written here and nobody has now.
    pub discarded_bytes: u64,
    /// Whose the volume is now.
    pub owner: Name,
}

/// The body of `POST /v1/volumes/NAME/reclaim`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// The epoch that the volume's status shows: proof that somebody looked.
    pub epoch: u64,
}

fn is_owner_by_default() -> bool {
    true
}

/// The answer to [`Reclaim`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimAnswer {
    /// The volume's epoch from now on.
    pub epoch: u64,
    /// Whether this site owns it now. Of a volume of which nothing was here the name is free. A daemon of an earlier version does not say.
    #[serde(default = "is_owner_by_default")]
    pub is_owner: bool,
    /// What is lost, a sentence each.
    pub lost: Vec<String>,
    /// How much is lost at most, where that is known.
    pub lost_bytes: Option<u64>,
    /// The peer that may not serve the volume should it come back.
    pub fenced: Option<Name>,
}

/// The body of `POST /v1/prewarms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prewarm {
    /// Absolute paths at the daemon's site, at least one.
    pub images: Vec<PathBuf>,
}

/// The answer to [`Prewarm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrewarmStarted {
    /// What to ask for.
    pub job: JobId,
}

/// The number of a job, unique until the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for JobId {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(JobId)
    }
}

/// Why a request was not fulfilled: which volume or peer, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// Who is to act.
    pub kind: ErrorKind,
    /// What went wrong, with the names of volume and peer. One line.
    pub message: String,
    /// What to do next; may be empty.
    #[serde(rename = "next")]
    pub hint: String,
}

/// The kinds of refusal, each with its HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// There is no such thing. 404
    NotFound,
    /// Not in this state, or it exists already. 409
    Conflict,
    /// The request makes no sense. 400
    Invalid,
    /// Possible, and forbidden: it would lose data, or a peer does not grant it. 403
    Refused,
    /// Not now: a peer or a disk does not answer. 503
    Unavailable,
    /// It was begun, and goes on behind this answer; the status tells what came of it. 503
    UnderWay,
    /// A fault of this program or its machine. 500
    Internal,
}

impl ErrorKind {
    /// Whether the same question may be answered before long: this says nothing about what was asked for.
    pub fn is_passing(self) -> bool {
        match self {
            ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Invalid | ErrorKind::Refused => false,
            ErrorKind::Unavailable | ErrorKind::UnderWay | ErrorKind::Internal => true,
        }
    }
}

impl ApiError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError { kind, message: message.into(), hint: hint.into() }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.hint.is_empty() {
            write!(f, "; {}", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for ApiError {}
