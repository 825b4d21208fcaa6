//! The seam between the API and the site: what can be asked, and how a refusal looks.
//! Must not know HTTP nor sockets.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::core::ids::Name;

use super::status::{PrewarmStatus, SiteStatus, StoreStats, VolumeStatus};

/// The answer to a question.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, ApiError>>;

/// What a site can be asked. Every answer must come within [`super::REQUEST_TIMEOUT`]: long work is started here and
/// watched by its status.
pub trait Site: Send + Sync + 'static {
    /// Everything at a glance.
    fn status(&self) -> Answer<'_, SiteStatus>;
    /// One volume.
    fn volume_status(&self, name: Name) -> Answer<'_, VolumeStatus>;
    /// Takes an image into ownership and serves it.
    fn add_volume(&self, add: AddVolume) -> Answer<'_, ()>;
    /// Stops serving an image that this site owns; the image stays.
    fn remove_volume(&self, name: Name) -> Answer<'_, ()>;
    /// Begins relocations. One result for each request, in their order.
    fn relocate(&self, requests: Vec<RelocateRequest>) -> BoxFuture<'_, Vec<Result<(), ApiError>>>;
    /// Pauses a bulk copy.
    fn pause(&self, name: Name) -> Answer<'_, ()>;
    /// Lets a paused bulk copy go on.
    fn resume(&self, name: Name) -> Answer<'_, ()>;
    /// Limits a bulk copy, in bytes per second; `None` removes its limit.
    fn limit(&self, name: Name, bytes_per_s: Option<u64>) -> Answer<'_, ()>;
    /// Gives a relocation up; refused where that would lose what the guest wrote.
    fn cancel(&self, name: Name) -> Answer<'_, ()>;
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
}

/// A volume to be brought here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelocateRequest {
    /// Where it is now.
    pub peer: Name,
    /// What it is called, there and here.
    pub volume: Name,
    /// The absolute path of the raw file to make; without one, the site chooses.
    #[serde(default)]
    pub image: Option<PathBuf>,
    /// Whether to copy what no guest asks for.
    #[serde(default = "yes")]
    pub bulk: bool,
    /// The most that its bulk copy may take, in bytes per second.
    #[serde(default)]
    pub bulk_rate_bytes_per_s: Option<u64>,
}

fn yes() -> bool {
    true
}

/// The body of `POST /v1/relocations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A fault of this program or its machine. 500
    Internal,
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
