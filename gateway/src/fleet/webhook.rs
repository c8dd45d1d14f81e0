//! Messages to the webhook: alarms, and other events that an operator should know at once. Start with
//! [`Webhook::notify`].
//!
//! Callers never wait for the receiver: messages are queued, and a task sends them one at a time.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use seawall_proto::{
    time::{Instant, WallTime},
    webhook::{Answer, Delivery, InvalidSecret, Message, Outbox, Secret},
};
use serde_json::{Value as Json, json};
use tokio::sync::Notify;
use ureq::Agent;
use uuid::Uuid;

use crate::{
    fleet::http,
    runtime::{
        config::{WebhookSettings, origin},
        data_dir::read_bounded,
    },
};

/// Maximum time of one attempt.
const ATTEMPT_MAX: Duration = Duration::from_secs(10);
/// Maximum time to connect in an attempt.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Maximum length of the secret file, in bytes.
const SECRET_BYTES_MAX: u64 = 4 << 10;

/// The webhook's secret cannot be used. The error never repeats it.
#[derive(Debug, thiserror::Error)]
#[error("webhook.secret_file: {}: {problem}", path.display())]
pub struct WebhookError {
    path: PathBuf,
    problem: String,
}

/// The queue of messages, and their receiver. Without a receiver nothing is queued.
#[derive(Debug, Default)]
pub struct Webhook {
    receiver: Option<Receiver>,
    node: String,
    outbox: Mutex<Outbox>,
    queued: Notify,
    counts: [AtomicU64; Delivery::ALL.len()],
}

/// Receiver of messages.
#[derive(Clone)]
pub struct Receiver {
    agent: Agent,
    url: Arc<str>,
    secret_file: PathBuf,
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The path of a URL may be a secret.
        f.write_str("Receiver(…)")
    }
}

/// Answer of a receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Posted {
    pub answer: Answer,
    /// HTTP status; `None` without an answer.
    pub status: Option<u16>,
    /// Cause of a missing answer.
    pub problem: Option<String>,
}

impl Posted {
    /// An attempt without an answer.
    pub(crate) const fn failed(problem: String) -> Self {
        Self {
            answer: Answer::Failed { retry_after: None },
            status: None,
            problem: Some(problem),
        }
    }
}

impl Webhook {
    /// Reads the secret once, so that an invalid one is found at the start.
    ///
    /// # Errors
    /// The secret cannot be read, or is invalid.
    pub fn open(settings: &WebhookSettings, node: &str) -> Result<Self, WebhookError> {
        let (Some(url), Some(secret_file)) = (&settings.url, &settings.secret_file) else {
            return Ok(Self::default());
        };
        let receiver = Receiver {
            agent: http::agent(CONNECT_MAX, ATTEMPT_MAX),
            url: url.as_str().into(),
            secret_file: secret_file.clone(),
        };
        receiver.secret()?;
        Ok(Self {
            receiver: Some(receiver),
            node: node.to_owned(),
            ..Self::default()
        })
    }

    #[must_use]
    pub fn receiver(&self) -> Option<&Receiver> {
        self.receiver.as_ref()
    }

    /// Queues a message, for example of type `alarm.raised`. Never waits. `data` must not contain a secret.
    pub fn notify(&self, kind: &str, at: WallTime, now: Instant, data: Json) {
        if self.receiver.is_none() {
            return;
        }
        let dropped = self.outbox().push(self.message(kind, at, data), now);
        if let Some(dropped) = dropped {
            self.count(dropped);
        }
        self.queued.notify_one();
    }

    /// Creates a message with a new id.
    #[must_use]
    pub fn message(&self, kind: &str, at: WallTime, data: Json) -> Message {
        let body = json!({ "type": kind, "timestamp": at.to_rfc3339(), "node": self.node, "data": data });
        Message {
            id: format!("msg_{}", Uuid::now_v7().simple()).into(),
            body: body.to_string().into(),
        }
    }

    /// The message to send now, or the time at which to ask again. `None`: after [`Webhook::queued`] returns.
    pub(crate) fn next(&self, now: Instant) -> Result<Message, Option<Instant>> {
        let outbox = self.outbox();
        outbox.poll_message(now).ok_or_else(|| outbox.poll_timeout())
    }

    /// Waits until a message is queued.
    pub(crate) async fn queued(&self) {
        self.queued.notified().await;
    }

    pub(crate) fn handle_answer(&self, id: &str, answer: Answer, now: Instant) -> Option<Delivery> {
        let delivery = self.outbox().handle_answer(id, answer, now, &mut rand::rng())?;
        self.count(delivery);
        Some(delivery)
    }

    /// Number of messages that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.outbox().len()
    }

    /// Number of deliveries with this outcome.
    #[must_use]
    pub fn deliveries(&self, delivery: Delivery) -> u64 {
        self.counts[delivery as usize].load(Ordering::Relaxed)
    }

    fn count(&self, delivery: Delivery) {
        self.counts[delivery as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receiver {
    /// Scheme, host and port. The rest of a URL may be a secret.
    #[must_use]
    pub fn origin(&self) -> String {
        origin(&self.url)
    }

    /// Sends a message, signed for this time. Blocks for at most 10 s.
    #[must_use]
    pub fn post(&self, message: &Message, at: WallTime) -> Posted {
        // Read each time, so that a new secret needs no restart.
        let secret = match self.secret() {
            Ok(secret) => secret,
            Err(error) => return Posted::failed(error.to_string()),
        };
        let seconds = at.as_unix_ms() / 1_000;
        let sent = self
            .agent
            .post(&*self.url)
            .header("content-type", "application/json")
            .header("webhook-id", &*message.id)
            .header("webhook-timestamp", seconds.to_string())
            .header("webhook-signature", secret.sign(&message.id, seconds, &message.body))
            .send(&*message.body);
        match sent {
            Ok(answer) => {
                let retry_after = answer
                    .headers()
                    .get("retry-after")
                    .and_then(|value| value.to_str().ok());
                let retry_after = retry_after.and_then(|text| text.trim().parse().ok());
                let status = answer.status().as_u16();
                Posted {
                    answer: Answer::of_status(status, retry_after.map(Duration::from_secs)),
                    status: Some(status),
                    problem: None,
                }
            }
            // Some errors repeat the URL.
            Err(error) => Posted::failed(error.to_string().replace(&*self.url, &self.origin())),
        }
    }

    fn secret(&self) -> Result<Secret, WebhookError> {
        let problem = |problem: String| WebhookError {
            path: self.secret_file.clone(),
            problem,
        };
        let bytes = read_bounded(&self.secret_file, SECRET_BYTES_MAX).map_err(|error| problem(error.to_string()))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| problem(InvalidSecret.to_string()))?;
        Secret::parse(text).map_err(|error| problem(error.to_string()))
    }
}
