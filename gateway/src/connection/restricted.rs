//! Restricted sessions: a device that a rule restricts is upgraded without authentication, gets its update notice, and
//! is closed. It has no presence, is not registered as a session, and nothing that it sends is kept.

use std::{sync::Arc, time::Duration};

use seawall_proto::{connect::Restriction, hello::Hello};
use tokio::{sync::OwnedSemaphorePermit, time::sleep};

use super::{answer, live, record::AttemptRecord};
use crate::{
    edge::{address::Share, limiter::ConnectionLimiter, transport::Transport},
    fleet::cohorts::Outcome,
    node::Shared,
    runtime::memory::Room,
    session::socket::Socket,
};

/// Maximum time for a device to read its update and to answer the close frame. Data that it sends meanwhile is
/// discarded. Closing earlier would reset the connection, which destroys what the device has not read yet.
const READING_MAX: Duration = Duration::from_secs(15);
/// Minimum time for that, even if other devices need its place.
const READING_MIN: Duration = Duration::from_secs(2);

/// A device that a rule restricts, and what its connection holds.
pub(super) struct Restricted {
    pub(super) hello: Hello,
    pub(super) restriction: Box<Restriction>,
    /// Data that it sent after its head.
    pub(super) leftover: Vec<u8>,
    pub(super) place: OwnedSemaphorePermit,
    pub(super) room: Room,
}

/// Answers 101 with the update in one write, closes, and waits for the client to do so.
pub(super) async fn run(
    shared: Shared,
    limiter: Arc<ConnectionLimiter>,
    mut stream: Transport,
    record: AttemptRecord,
    restricted: Restricted,
    share: Share,
) {
    if stream.has_left() {
        return record.count(Outcome::Abandoned);
    }
    let Restricted {
        hello,
        restriction,
        leftover,
        place,
        room,
    } = restricted;
    let Restriction { rule, frame, close, .. } = *restriction;
    let mut first_bytes = answer::switching_protocols(&hello.websocket_key, hello.protocol.as_deref());
    drop(hello);
    let frame_len = frame.len();
    live::put_text(frame.as_ref().to_owned(), &mut first_bytes);
    if answer::write(&shared, &mut stream, &first_bytes).await.is_err() {
        return record.count(Outcome::Abandoned);
    }
    shared.metrics.session_bytes.add("out", frame_len as u64);
    record.restricted(rule);
    let socket = Socket::new(stream, &leftover, Arc::clone(&shared.socket_limits));
    tokio::select! {
        () = socket.close_within(&close, READING_MAX) => {}
        () = limiter.closing.cancelled() => {}
        () = async {
            sleep(READING_MIN).await;
            shared.restricted.is_wanted().await;
        } => {}
    }
    drop((place, room, share));
}
