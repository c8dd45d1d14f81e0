//! Sends queued messages to the webhook, one at a time. Start with [`deliver`].

use std::sync::Arc;

use seawall_proto::{
    time::Instant,
    webhook::{Delivery, Message},
};
use tokio::{task::spawn_blocking, time::sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{fleet::webhook::Posted, node::Shared};

/// Sends messages until `stop`.
pub async fn deliver(state: Shared, stop: CancellationToken) {
    let mut is_failing = false;
    loop {
        match state.webhook.next(state.clock.now()) {
            Ok(message) => {
                let Some(posted) = stop.run_until_cancelled(post(&state, message.clone())).await else {
                    return;
                };
                handle(&state, &message, &posted, &mut is_failing);
            }
            Err(due) => tokio::select! {
                () = stop.cancelled() => return,
                () = state.webhook.queued() => {}
                () = sleep_until(state.clock.deadline(due.unwrap_or(Instant::FAR_FUTURE))) => {}
            },
        }
    }
}

/// Sends one message, on a blocking thread.
async fn post(state: &Shared, message: Message) -> Posted {
    let shared = Arc::clone(state);
    let posting = spawn_blocking(move || {
        let receiver = shared.webhook.receiver();
        receiver.map(|receiver| receiver.post(&message, shared.clock.wall()))
    });
    match posting.await {
        Ok(Some(posted)) => posted,
        Ok(None) => Posted::failed("no webhook is configured".to_owned()),
        Err(error) => Posted::failed(error.to_string()),
    }
}

fn handle(state: &Shared, message: &Message, posted: &Posted, is_failing: &mut bool) {
    let delivery = state
        .webhook
        .handle_answer(&message.id, posted.answer, state.clock.now());
    let receiver = state.webhook.receiver().map(|receiver| receiver.origin());
    match delivery {
        Some(Delivery::Delivered) => {
            if std::mem::take(is_failing) {
                tracing::info!(receiver, "webhook accepts messages again");
            }
        }
        Some(Delivery::GivenUp) => {
            *is_failing = true;
            tracing::error!(
                receiver,
                webhook.id = &*message.id,
                status = posted.status,
                problem = posted.problem,
                "webhook message given up"
            );
        }
        Some(Delivery::Retried | Delivery::Dropped) | None => {
            if !std::mem::replace(is_failing, true) {
                tracing::warn!(
                    receiver,
                    status = posted.status,
                    problem = posted.problem,
                    "webhook does not accept messages: they are retried for an hour"
                );
            }
        }
    }
}
