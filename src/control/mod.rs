//! The control API: HTTP and JSON over a unix socket, for the command line and for whoever scripts a site.
//! Must not know how a site does what it is asked: [`Site`] is the seam. Must not know the store's internals.
//!
//! Sizes are bytes, times are seconds (`_s`) or milliseconds (`_ms`). Bodies are JSON whatever their content type says;
//! unknown fields are errors.
//!
//! | request | body -> answer |
//! |---|---|
//! | `GET /v1/status` | [`SiteStatus`] |
//! | `GET /v1/volumes` | all [`VolumeStatus`] |
//! | `GET /v1/volumes/NAME` | one [`VolumeStatus`] |
//! | `POST /v1/volumes` | [`AddVolume`] -> 201, its [`VolumeStatus`] |
//! | `DELETE /v1/volumes/NAME` | 204: an owned image is no longer served |
//! | `POST /v1/relocations` | [`Relocations`] -> [`RelocationAnswers`]: 202 if all began, 207 if some did not |
//! | `POST /v1/volumes/NAME/pause` | 204: the bulk copy pauses |
//! | `POST /v1/volumes/NAME/resume` | 204: it goes on |
//! | `POST /v1/volumes/NAME/limit` | [`Limit`] -> 204 |
//! | `POST /v1/volumes/NAME/cancel` | [`Cancel`], or nothing -> [`CancelAnswer`]: the relocation is given up |
//! | `POST /v1/volumes/NAME/reclaim` | [`Reclaim`] -> [`ReclaimAnswer`]: ended without the peer, which is lost for good |
//! | `POST /v1/peers/NAME/accept` | 204: whichever instance of the peer comes next is the one |
//! | `POST /v1/prewarms` | [`Prewarm`] -> 202, [`PrewarmStarted`] |
//! | `GET /v1/prewarms/JOB` | [`PrewarmStatus`] |
//! | `GET /v1/store` | [`StoreStats`] |
//!
//! ```sh
//! ferry() { curl -s --unix-socket /var/lib/blockferry/control.sock "http://x/v1/$1" "${@:2}"; }
//! ferry status
//! ferry volumes/web-01
//! ferry volumes -d '{"name":"web-01","image":"/srv/web-01.raw"}'
//! ferry volumes/web-01 -X DELETE
//! ferry relocations -d '{"relocations":[{"peer":"site-b","volume":"web-01","image":"/srv/web-01.raw"}]}'
//! ferry relocations -d '{"relocations":[{"peer":"site-b","volume":"db","bulk":false}]}'
//! ferry volumes/web-01/pause -X POST
//! ferry volumes/web-01/resume -X POST
//! ferry volumes/web-01/limit -d '{"bytes_per_s":1000000}'
//! ferry volumes/web-01/cancel -X POST
//! ferry volumes/web-01/cancel -d '{"discard_writes":true}'
//! ferry volumes/web-01/reclaim -d '{"epoch":3}'
//! ferry peers/site-b/accept -X POST
//! ferry prewarms -d '{"images":["/srv/template.raw"]}'
//! ferry prewarms/1
//! ferry store
//! ```
//!
//! What fails answers with its status and `{"error":{"kind":"not_found","message":"...","next":"what to do"}}`:
//! `invalid` 400, `refused` 403, `not_found` 404, `conflict` 409, `internal` 500, `unavailable` and `under_way` 503.
//!
//! A request that changes something is carried out to its end, whether its client waits or not. Where it takes longer
//! than [`REQUEST_TIMEOUT`], the answer is `under_way`: it goes on, and the status tells what came of it.

mod client;
#[cfg(test)]
pub(crate) mod fake;
mod server;
mod site;
mod socket;
mod status;

pub use self::client::{ClientError, ControlClient};
pub use self::server::{ControlServer, MAX_BODY_BYTES, MAX_CONNECTIONS, REQUEST_TIMEOUT};
pub use self::site::{
    AddVolume, Answer, ApiError, Cancel, CancelAnswer, DEFAULT_HANDOVER_TIMEOUT, ErrorKind, JobId, Limit, Prewarm,
    PrewarmStarted, Reclaim, ReclaimAnswer, RelocateRequest, RelocationAnswer, RelocationAnswers, Relocations, Site,
};
pub use self::socket::{ControlSocket, SocketError};
pub use self::status::{
    BlockCounts, BulkStatus, LatencyMs, Left, LinkState, LinkStatus, MovedBytes, Owed, OwedOfVolume, PeerStatus, Phase,
    PrewarmStatus, ReadBytes, Role, SiteStatus, StoreStats, VolumeStatus, WireBytes,
};
