//! Reads and discards the rest of a body that no handler reads, so that the client sees the answer.
//!
//! Closing a connection with unread bytes resets it, and the reset overtakes the answer: a wrong token would look like
//! a broken network. A client that waits for `100 Continue` has sent nothing yet. Reading would ask it for the body, so
//! nothing is read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, HttpBody as _},
    extract::Request,
    http::header,
    middleware::Next,
    response::Response,
};
use futures_util::{StreamExt as _, stream};
use tokio::{sync::Mutex, time::timeout};

use super::call::Call;

/// Maximum time to read the rest of a body. A slower client sees a closed connection.
const DISCARDING_MAX: Duration = Duration::from_secs(5);
/// The same if the caller has not shown a valid token, whatever the answer is.
const UNAUTHENTICATED_DISCARDING_MAX: Duration = Duration::from_millis(500);

/// Handles a request, and discards the rest of its body before the answer is written.
pub async fn discard_rest(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let call = parts.extensions.get::<Arc<Call>>().cloned();
    let expects_continue = parts
        .headers
        .get(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let is_begun = Arc::new(AtomicBool::new(false));
    // First the handler has it, then this function: the lock is never contended.
    let body = Arc::new(Mutex::new(body.into_data_stream()));
    let shared = (Arc::clone(&body), Arc::clone(&is_begun));
    let handed_on = Body::from_stream(stream::unfold(shared, |(body, is_begun)| async move {
        is_begun.store(true, Ordering::Relaxed);
        let piece = body.lock().await.next().await?;
        Some((piece, (body, is_begun)))
    }));
    let response = next.run(Request::from_parts(parts, handed_on)).await;
    if expects_continue && !is_begun.load(Ordering::Relaxed) {
        return response;
    }
    let time_max = if call.is_some_and(|call| call.is_authenticated()) {
        DISCARDING_MAX
    } else {
        UNAUTHENTICATED_DISCARDING_MAX
    };
    // After that the connection is closed.
    let _ = timeout(time_max, discard(&body)).await;
    response
}

async fn discard(body: &Mutex<BodyDataStream>) {
    let mut body = body.lock().await;
    while let Some(Ok(_)) = body.next().await {}
}
