//! What bounds a request: its size, its time. A request that changes something is carried out to its end whatever
//! becomes of its client, and its answer comes within the time nevertheless.
//! Must not know what is asked.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use super::{MAX_BODY_BYTES, invalid};
use crate::control::{ApiError, ErrorKind};

/// The bounds of all requests, and those that are under way.
#[derive(Clone)]
pub(super) struct Bounds {
    /// From a request's head to its answer.
    pub(super) timeout: Duration,
    /// The requests that change something and have not ended.
    pub(super) under_way: TaskTracker,
}

impl Bounds {
    pub(super) fn new(timeout: Duration) -> Bounds {
        Bounds { timeout, under_way: TaskTracker::new() }
    }

    /// The answer to `request`, within the time.
    pub(super) async fn answer(self, request: Request, next: Next) -> Response {
        let what = format!("{} {}", request.method(), request.uri().path());
        let asks_only = request.method().is_safe();
        let until = tokio::time::Instant::now() + self.timeout;
        let give_up = || self.gave_up(&what);
        // What has not arrived in full has not begun: it ends with its client.
        let request = match tokio::time::timeout_at(until, whole(request)).await {
            Ok(Ok(request)) => request,
            Ok(Err(error)) => return error.into_response(),
            Err(_) => return give_up(),
        };
        if asks_only {
            return tokio::time::timeout_at(until, next.run(request)).await.unwrap_or_else(|_| give_up());
        }
        let (sender, answer) = oneshot::channel();
        let name = what.clone();
        // A task of its own: this future is dropped when the client hangs up, wherever it waits.
        self.under_way.spawn(async move {
            let response = next.run(request).await;
            if let Err(response) = sender.send(response) {
                log_unheard(&name, &response);
            }
        });
        match tokio::time::timeout_at(until, answer).await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => {
                let message = format!("{what} ended without an answer");
                let hint = "it panicked: report the daemon's log as a bug, and look at the status";
                ApiError::new(ErrorKind::Internal, message, hint).into_response()
            }
            Err(_) => {
                tracing::warn!(request = %what, "a control request takes long; it goes on");
                let message = format!("{what} is still under way after {} s, and goes on", self.timeout.as_secs());
                ApiError::new(ErrorKind::UnderWay, message, "`blockferry status` tells what comes of it")
                    .into_response()
            }
        }
    }

    fn gave_up(&self, what: &str) -> Response {
        tracing::warn!(request = %what, "a control request took too long and was given up");
        let message = format!("{what} was not answered within {} s", self.timeout.as_secs());
        ApiError::new(ErrorKind::Unavailable, message, "look at the status before you ask again").into_response()
    }
}

/// The request with its body in memory.
async fn whole(request: Request) -> Result<Request, ApiError> {
    let (head, body) = request.into_parts();
    let read = axum::body::to_bytes(body, MAX_BODY_BYTES).await;
    let body = read
        .map_err(|error| invalid(format!("the body cannot be read ({error})"), "send a JSON body of at most 4 MiB"))?;
    Ok(Request::from_parts(head, Body::from(body)))
}

/// Nobody hears the answer any more: the log keeps what came of the request.
fn log_unheard(request: &str, response: &Response) {
    let status: StatusCode = response.status();
    match response.extensions().get::<ApiError>() {
        Some(error) => tracing::warn!(request, %status, %error, "a control request failed after its client had left"),
        None => tracing::info!(request, %status, "a control request has ended after its client had left"),
    }
}
