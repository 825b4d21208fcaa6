//! The server of the control API: routes, bounds and errors as JSON.
//! Must not know how a site does what it is asked.

mod bounds;

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::Listener;
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::core::ids::Name;

use self::bounds::Bounds;
use super::site::{
    AddVolume, ApiError, Cancel, CancelAnswer, ErrorKind, JobId, Limit, Prewarm, PrewarmStarted, ReclaimAnswer,
    RelocationAnswer, RelocationAnswers, Relocations, Site,
};
use super::socket::{ControlSocket, SocketError};
use super::status::{PrewarmStatus, SiteStatus, StoreStats, VolumeStatus};

/// The largest request body: some ten thousand relocations at once.
pub const MAX_BODY_BYTES: usize = 4 << 20;

/// How long a request's answer may take in all. A site that needs longer answers that it began, and is watched by its
/// status; a change that is under way by then is not cut short.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections at once; the next one waits until one of them closes.
pub const MAX_CONNECTIONS: usize = 64;

/// The control API on its socket.
#[derive(Debug)]
pub struct ControlServer {
    socket: ControlSocket,
    timeout: Duration,
}

/// The body of every answer that is an error.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ErrorBody {
    pub error: ApiError,
}

type Shared = State<Arc<dyn Site>>;
type Body = Result<Bytes, BytesRejection>;

impl ControlServer {
    /// Makes the socket and listens; clients that connect from now on wait for [`ControlServer::serve`]. Must be called
    /// within a tokio runtime.
    pub fn bind(socket_path: &Path) -> Result<ControlServer, SocketError> {
        ControlSocket::bind(socket_path).map(|socket| ControlServer { socket, timeout: REQUEST_TIMEOUT })
    }

    /// The same with another time than [`REQUEST_TIMEOUT`].
    #[cfg(test)]
    pub(super) fn within(self, timeout: Duration) -> ControlServer {
        ControlServer { timeout, ..self }
    }

    /// Where it listens.
    pub fn socket_path(&self) -> &Path {
        self.socket.path()
    }

    /// Answers until `shutdown` completes, then finishes the requests in hand (at most [`REQUEST_TIMEOUT`] each, those
    /// whose clients have left among them) and removes the socket.
    pub async fn serve(
        self,
        site: Arc<dyn Site>,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let (listener, file) = self.socket.into_parts();
        let listener = Bounded { listener, permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)) };
        let bounds = Bounds::new(self.timeout);
        let under_way = bounds.under_way.clone();
        let served = axum::serve(listener, router(site, bounds)).with_graceful_shutdown(shutdown).await;
        // Those whose clients left: they have begun to change something.
        under_way.close();
        if tokio::time::timeout(self.timeout, under_way.wait()).await.is_err() {
            tracing::warn!(count = under_way.len(), "control requests are cut off: they did not end in time");
        }
        drop(file);
        served
    }
}

fn router(site: Arc<dyn Site>, bounds: Bounds) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/volumes", get(list_volumes).post(add_volume))
        .route("/v1/volumes/{name}", get(show_volume).delete(remove_volume))
        .route("/v1/volumes/{name}/pause", post(pause))
        .route("/v1/volumes/{name}/resume", post(resume))
        .route("/v1/volumes/{name}/limit", post(limit))
        .route("/v1/volumes/{name}/cancel", post(cancel))
        .route("/v1/volumes/{name}/reclaim", post(reclaim))
        .route("/v1/peers/{name}/accept", post(accept_peer))
        .route("/v1/relocations", post(relocate))
        .route("/v1/prewarms", post(prewarm))
        .route("/v1/prewarms/{job}", get(prewarm_status))
        .route("/v1/store", get(store_stats))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(axum::middleware::from_fn(move |request, next| bounds.clone().answer(request, next)))
        .with_state(site)
}

async fn status(State(site): Shared) -> Result<Json<SiteStatus>, ApiError> {
    site.status().await.map(Json)
}

async fn list_volumes(State(site): Shared) -> Result<Json<Vec<VolumeStatus>>, ApiError> {
    site.status().await.map(|status| Json(status.volumes))
}

async fn show_volume(State(site): Shared, name: UrlPath<String>) -> Result<Json<VolumeStatus>, ApiError> {
    site.volume_status(volume_name(name)?).await.map(Json)
}

async fn add_volume(State(site): Shared, body: Body) -> Result<(StatusCode, Json<VolumeStatus>), ApiError> {
    let add: AddVolume = json(body)?;
    absolute(&add.image)?;
    let name = add.name.clone();
    site.add_volume(add).await?;
    Ok((StatusCode::CREATED, Json(site.volume_status(name).await?)))
}

async fn remove_volume(State(site): Shared, name: UrlPath<String>) -> Result<StatusCode, ApiError> {
    done(site.remove_volume(volume_name(name)?).await)
}

async fn pause(State(site): Shared, name: UrlPath<String>) -> Result<StatusCode, ApiError> {
    done(site.pause(volume_name(name)?).await)
}

async fn resume(State(site): Shared, name: UrlPath<String>) -> Result<StatusCode, ApiError> {
    done(site.resume(volume_name(name)?).await)
}

async fn limit(State(site): Shared, name: UrlPath<String>, body: Body) -> Result<StatusCode, ApiError> {
    let Limit { bytes_per_s } = json(body)?;
    limit_is_not_zero(bytes_per_s)?;
    done(site.limit(volume_name(name)?, bytes_per_s).await)
}

async fn cancel(State(site): Shared, name: UrlPath<String>, body: Body) -> Result<Json<CancelAnswer>, ApiError> {
    let cancel = match body {
        Ok(body) if body.is_empty() => Cancel::default(),
        body => json(body)?,
    };
    site.cancel(volume_name(name)?, cancel).await.map(Json)
}

async fn reclaim(State(site): Shared, name: UrlPath<String>, body: Body) -> Result<Json<ReclaimAnswer>, ApiError> {
    let name = volume_name(name)?;
    site.reclaim(name, json(body)?).await.map(Json)
}

async fn accept_peer(State(site): Shared, name: UrlPath<String>) -> Result<StatusCode, ApiError> {
    site.accept_peer(volume_name(name)?).await.map(|()| StatusCode::NO_CONTENT)
}

async fn relocate(State(site): Shared, body: Body) -> Result<(StatusCode, Json<RelocationAnswers>), ApiError> {
    let Relocations { relocations } = json(body)?;
    if relocations.is_empty() {
        return Err(invalid("there is nothing in relocations", "name at least one peer and volume"));
    }
    for request in &relocations {
        limit_is_not_zero(request.bulk_rate_bytes_per_s)?;
        request.image.as_deref().map_or(Ok(()), absolute)?;
        timeout_is_sound(request.timeout_s)?;
    }
    let asked: Vec<_> = relocations.iter().map(|request| (request.peer.clone(), request.volume.clone())).collect();
    let results = site.relocate(relocations).await;
    if results.len() != asked.len() {
        let message = format!("the site answered {} of {} relocations", results.len(), asked.len());
        return Err(ApiError::new(ErrorKind::Internal, message, "look at the status and at the daemon's log"));
    }
    let answers = asked.into_iter().zip(results);
    let answers =
        answers.map(|((peer, volume), result)| RelocationAnswer { peer, volume, error: result.err() }).collect();
    let answers = RelocationAnswers { relocations: answers };
    let all = answers.relocations.iter().all(|answer| answer.error.is_none());
    Ok((if all { StatusCode::ACCEPTED } else { StatusCode::MULTI_STATUS }, Json(answers)))
}

async fn prewarm(State(site): Shared, body: Body) -> Result<(StatusCode, Json<PrewarmStarted>), ApiError> {
    let Prewarm { images } = json(body)?;
    if images.is_empty() {
        return Err(invalid("there is nothing in images", "name at least one"));
    }
    images.iter().try_for_each(|image| absolute(image))?;
    let job = site.prewarm(images).await?;
    Ok((StatusCode::ACCEPTED, Json(PrewarmStarted { job })))
}

async fn prewarm_status(State(site): Shared, job: UrlPath<String>) -> Result<Json<PrewarmStatus>, ApiError> {
    let job: JobId = job
        .0
        .parse()
        .map_err(|_| invalid(format!("{:?} is no job", job.0), "take the number that starting it gave"))?;
    site.prewarm_status(job).await.map(Json)
}

async fn store_stats(State(site): Shared) -> Result<Json<StoreStats>, ApiError> {
    site.store_stats().await.map(Json)
}

async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    let message = format!("there is no {method} {}", uri.path());
    ApiError::new(ErrorKind::NotFound, message, "GET /v1/status is a place to begin")
}

async fn no_such_method(method: Method, uri: Uri) -> Response {
    let error = invalid(format!("{} does not take {method}", uri.path()), "see the API's table of requests");
    (StatusCode::METHOD_NOT_ALLOWED, Json(ErrorBody { error })).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.kind {
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::Refused => StatusCode::FORBIDDEN,
            ErrorKind::Unavailable | ErrorKind::UnderWay => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut response = (status, Json(ErrorBody { error: self.clone() })).into_response();
        // For the log, should nobody hear the answer.
        response.extensions_mut().insert(self);
        response
    }
}

fn invalid(message: impl Into<String>, hint: &str) -> ApiError {
    ApiError::new(ErrorKind::Invalid, message, hint)
}

fn done(result: Result<(), ApiError>) -> Result<StatusCode, ApiError> {
    result.map(|()| StatusCode::NO_CONTENT)
}

fn volume_name(name: UrlPath<String>) -> Result<Name, ApiError> {
    name.0.parse().map_err(|error: crate::core::ids::BadName| invalid(error.to_string(), ""))
}

/// What scripts send is JSON, whatever content type their client put on it (curl says it is a form).
fn json<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    let body = body.map_err(|error| invalid(error.body_text(), "send a JSON body of less than 4 MiB"))?;
    serde_json::from_slice(&body).map_err(|error| invalid(format!("the body is not as expected: {error}"), ""))
}

/// The daemon's working directory is not the caller's.
fn absolute(path: &Path) -> Result<(), ApiError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(invalid(format!("the image path {:?} is not absolute", path.display().to_string()), "begin it with /"))
}

fn limit_is_not_zero(bytes_per_s: Option<u64>) -> Result<(), ApiError> {
    if bytes_per_s == Some(0) {
        return Err(invalid("a limit of 0 bytes per second would never end", "pause the volume instead"));
    }
    Ok(())
}

fn timeout_is_sound(timeout_s: Option<f64>) -> Result<(), ApiError> {
    match timeout_s.map(Duration::try_from_secs_f64) {
        None => Ok(()),
        Some(Ok(timeout)) if !timeout.is_zero() => Ok(()),
        Some(_) => Err(invalid("timeout_s is no time that a hand-over could take", "give seconds, more than 0")),
    }
}

/// A listener that admits [`MAX_CONNECTIONS`] at once.
struct Bounded {
    listener: UnixListener,
    permits: Arc<Semaphore>,
}

/// A connection and its permit.
struct Admitted {
    stream: UnixStream,
    _permit: OwnedSemaphorePermit,
}

impl Listener for Bounded {
    type Io = Admitted;
    type Addr = ();

    async fn accept(&mut self) -> (Admitted, ()) {
        loop {
            let Ok(permit) = self.permits.clone().acquire_owned().await else {
                // Nobody closes the semaphore; were it closed, admitting nobody would be the right thing.
                std::future::pending::<()>().await;
                continue;
            };
            // axum's own listener logs a failing accept and waits before it tries again.
            let (stream, _) = Listener::accept(&mut self.listener).await;
            return (Admitted { stream, _permit: permit }, ());
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Admitted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
