//! What a client still sends of a body that nobody reads: taken and thrown away, so that it gets to see the answer.
//!
//! Closing a connection with unread bytes resets it, and the reset overtakes the answer: a wrong token would look like a broken
//! network. A client that waits for `100 Continue` has sent nothing yet, and reading would ask it for the body: there nothing is taken.

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
    http::{StatusCode, header},
    middleware::Next,
    response::Response,
};
use futures_util::{StreamExt as _, stream};
use tokio::{sync::Mutex, time::timeout};

/// Maximum time for it. A slower client sees a closed connection.
const DISCARDING_MAX: Duration = Duration::from_secs(5);
/// Maximum time for it where the caller has no valid token: strangers get no reader for long.
const DISCARDING_OF_STRANGERS_MAX: Duration = Duration::from_millis(500);

/// Lets a request be handled, and takes the rest of its body before the answer goes out.
pub async fn rest(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let expects_continue = parts
        .headers
        .get(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let is_begun = Arc::new(AtomicBool::new(false));
    // The handler has it first, then we: nobody ever waits for this lock.
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
    let time = if response.status() == StatusCode::UNAUTHORIZED {
        DISCARDING_OF_STRANGERS_MAX
    } else {
        DISCARDING_MAX
    };
    // Where time is over, the connection is closed with what is left.
    let _ = timeout(time, discard(&body)).await;
    response
}

async fn discard(body: &Mutex<BodyDataStream>) {
    let mut body = body.lock().await;
    while let Some(Ok(_)) = body.next().await {}
}
