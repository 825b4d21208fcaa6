//! The client of the control API, for the command line.
//! Must not know how the answers are shown.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::core::ids::Name;

use super::server::{ErrorBody, REQUEST_TIMEOUT};
use super::site::{
    AddVolume, ApiError, Cancel, CancelAnswer, JobId, Limit, Prewarm, PrewarmStarted, Reclaim, ReclaimAnswer,
    RelocateRequest, RelocationAnswer, RelocationAnswers, Relocations,
};
use super::status::{PrewarmStatus, SiteStatus, StoreStats, VolumeStatus};

/// The largest answer: a site's status with some ten thousand volumes.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A little more than the daemon gives itself, so that its own error arrives first.
const PATIENCE: Duration = REQUEST_TIMEOUT.saturating_add(Duration::from_secs(5));

/// Speaks with the daemon behind a control socket; every request has its own connection.
#[derive(Clone, Debug)]
pub struct ControlClient {
    socket_path: PathBuf,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon answers at {}: {source}: start one with `blockferry serve`, or name its socket by --socket",
        path.display()
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody listens, and the conversation failed.
    #[error("the daemon at {} {what}: is it another version? its log may say more", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        what: String,
    },
    /// Somebody took the request and went away: it was stopped, or it crashed.
    #[error(
        "the daemon at {} ended before it answered: start it again with `blockferry serve`; `blockferry status` then tells \
         whether the request was carried out",
        path.display()
    )]
    Ended {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon says no.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

impl ControlClient {
    /// A client for the daemon at `socket_path`; nothing is connected yet.
    pub fn new(socket_path: impl Into<PathBuf>) -> ControlClient {
        ControlClient { socket_path: socket_path.into() }
    }

    /// The daemon's socket.
    pub fn socket_path(&self) -> &Path {
        &self.socket_path
    }

    /// `GET /v1/status`
    pub async fn status(&self) -> Result<SiteStatus, ClientError> {
        self.get("/v1/status").await
    }

    /// `GET /v1/volumes`
    pub async fn volumes(&self) -> Result<Vec<VolumeStatus>, ClientError> {
        self.get("/v1/volumes").await
    }

    /// `GET /v1/volumes/NAME`
    pub async fn volume(&self, name: &Name) -> Result<VolumeStatus, ClientError> {
        self.get(&format!("/v1/volumes/{name}")).await
    }

    /// `POST /v1/volumes`
    pub async fn add_volume(&self, add: &AddVolume) -> Result<VolumeStatus, ClientError> {
        self.send(Method::POST, "/v1/volumes", add).await
    }

    /// `DELETE /v1/volumes/NAME`
    pub async fn remove_volume(&self, name: &Name) -> Result<(), ClientError> {
        self.request(Method::DELETE, &format!("/v1/volumes/{name}"), Bytes::new()).await.map(drop)
    }

    /// `POST /v1/relocations`; one answer for each request, in their order.
    pub async fn relocate(&self, relocations: Vec<RelocateRequest>) -> Result<Vec<RelocationAnswer>, ClientError> {
        let body = Relocations { relocations };
        let answers: RelocationAnswers = self.send(Method::POST, "/v1/relocations", &body).await?;
        if answers.relocations.len() != body.relocations.len() {
            return Err(self.broken("did not answer every relocation"));
        }
        Ok(answers.relocations)
    }

    /// `POST /v1/volumes/NAME/pause`
    pub async fn pause(&self, name: &Name) -> Result<(), ClientError> {
        self.order(name, "pause").await
    }

    /// `POST /v1/volumes/NAME/resume`
    pub async fn resume(&self, name: &Name) -> Result<(), ClientError> {
        self.order(name, "resume").await
    }

    /// `POST /v1/volumes/NAME/limit`
    pub async fn limit(&self, name: &Name, bytes_per_s: Option<u64>) -> Result<(), ClientError> {
        let body = self.encode(&Limit { bytes_per_s })?;
        self.request(Method::POST, &format!("/v1/volumes/{name}/limit"), body).await.map(drop)
    }

    /// `POST /v1/volumes/NAME/cancel`; a daemon of an earlier version answers nothing.
    pub async fn cancel(&self, name: &Name, cancel: Cancel) -> Result<Option<CancelAnswer>, ClientError> {
        // Earlier versions take no body: none is sent where it would say nothing.
        let body = if cancel == Cancel::default() { Bytes::new() } else { self.encode(&cancel)? };
        let answer = self.request(Method::POST, &format!("/v1/volumes/{name}/cancel"), body).await?;
        if answer.is_empty() { Ok(None) } else { self.decode(&answer).map(Some) }
    }

    /// `POST /v1/peers/NAME/accept`
    pub async fn accept_peer(&self, name: &Name) -> Result<(), ClientError> {
        self.request(Method::POST, &format!("/v1/peers/{name}/accept"), Bytes::new()).await.map(drop)
    }

    /// `POST /v1/volumes/NAME/reclaim`
    pub async fn reclaim(&self, name: &Name, reclaim: Reclaim) -> Result<ReclaimAnswer, ClientError> {
        self.send(Method::POST, &format!("/v1/volumes/{name}/reclaim"), &reclaim).await
    }

    /// `POST /v1/prewarms`
    pub async fn prewarm(&self, images: Vec<PathBuf>) -> Result<JobId, ClientError> {
        let started: PrewarmStarted = self.send(Method::POST, "/v1/prewarms", &Prewarm { images }).await?;
        Ok(started.job)
    }

    /// `GET /v1/prewarms/JOB`
    pub async fn prewarm_status(&self, job: JobId) -> Result<PrewarmStatus, ClientError> {
        self.get(&format!("/v1/prewarms/{job}")).await
    }

    /// `GET /v1/store`
    pub async fn store_stats(&self) -> Result<StoreStats, ClientError> {
        self.get("/v1/store").await
    }

    async fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, ClientError> {
        self.decode(&self.request(Method::GET, route, Bytes::new()).await?)
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        route: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = self.encode(body)?;
        self.decode(&self.request(method, route, body).await?)
    }

    async fn order(&self, name: &Name, what: &str) -> Result<(), ClientError> {
        self.request(Method::POST, &format!("/v1/volumes/{name}/{what}"), Bytes::new()).await.map(drop)
    }

    /// The body of the answer, if it is a success.
    async fn request(&self, method: Method, route: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let exchange = self.exchange(method, route, body);
        let (status, body) = match tokio::time::timeout(PATIENCE, exchange).await {
            Ok(answer) => answer?,
            Err(_) => return Err(self.broken(format!("did not answer within {} s", PATIENCE.as_secs()))),
        };
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) => Err(ClientError::Refused(error)),
            Err(_) => Err(self.broken(format!("answered {status} to {route}"))),
        }
    }

    async fn exchange(&self, method: Method, route: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        let unreachable = |source| ClientError::Unreachable { path: self.socket_path.clone(), source };
        let stream = UnixStream::connect(&self.socket_path).await.map_err(unreachable)?;
        let broken = |error: hyper::Error| self.cut_off(&error);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let request = Request::builder()
            .method(method)
            .uri(route)
            .header("host", "blockferry")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(format!("cannot be asked for {route} ({error})")))?;
        let conversation = async {
            let response = sender.send_request(request).await.map_err(broken)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| match error.downcast_ref() {
                Some(error) => self.cut_off(error),
                None => self.broken(format!("gave no whole answer ({error})")),
            })?;
            Ok((status, body.to_bytes()))
        };
        // The connection moves the bytes; it can end before the answer is looked at, but not the other way round.
        tokio::pin!(conversation);
        let connection = async {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the control connection ended badly");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = &mut conversation => answer,
            () = connection => Err(self.broken("ended the conversation")),
        }
    }

    fn encode(&self, body: &impl Serialize) -> Result<Bytes, ClientError> {
        let encoded = serde_json::to_vec(body);
        encoded.map(Bytes::from).map_err(|error| self.broken(format!("cannot be asked this ({error})")))
    }

    fn decode<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.broken(format!("answered something else ({error})")))
    }

    /// What hyper's error says about the other side: that it speaks something else, or that it is gone.
    fn cut_off(&self, error: &hyper::Error) -> ClientError {
        if error.is_parse() || error.is_user() {
            return self.broken(format!("ended the conversation ({error})"));
        }
        tracing::debug!(%error, "the daemon ended before it answered");
        ClientError::Ended { path: self.socket_path.clone() }
    }

    fn broken(&self, what: impl Into<String>) -> ClientError {
        ClientError::Broken { path: self.socket_path.clone(), what: what.into() }
    }
}
