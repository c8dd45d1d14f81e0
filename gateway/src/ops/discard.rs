//! What a client still sends of a body that nobody reads any more: taken and thrown away, so that it gets to see the answer.
//!
//! Closing a connection with unread bytes resets it, and the reset overtakes the answer: a wrong token would look like a broken network.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, BodyDataStream, HttpBody as _},
    extract::Request,
    middleware::Next,
    response::Response,
};
use futures_util::{StreamExt as _, stream};
use tokio::{sync::Mutex, time::timeout};

/// Longest time for it. A client that is slower than that sees a closed connection.
const DISCARDING_MAX: Duration = Duration::from_secs(5);

/// Lets a request be handled, and takes the rest of its body before the answer goes out.
pub async fn rest(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    // The handler has it first, then we: nobody ever waits for this lock.
    let body = Arc::new(Mutex::new(body.into_data_stream()));
    let handed_on = Body::from_stream(stream::unfold(Arc::clone(&body), |body| async move {
        let piece = body.lock().await.next().await?;
        Some((piece, body))
    }));
    let response = next.run(Request::from_parts(parts, handed_on)).await;
    // Where time is over, the connection is closed with what is left.
    let _ = timeout(DISCARDING_MAX, discard(&body)).await;
    response
}

async fn discard(body: &Mutex<BodyDataStream>) {
    let mut body = body.lock().await;
    while let Some(Ok(_)) = body.next().await {}
}
