//! The step from an admitted device to its session: it is registered, answered with 101, and continued in a separate
//! task.

use std::sync::Arc;

use seawall_proto::{cohort::CohortTag, hello::SessionKind};

use super::{
    Accepted, answer,
    live::{self, Live},
    online::Online,
    record::AttemptRecord,
};
use crate::{
    edge::{address::Share, limiter::ConnectionLimiter, transport::Transport},
    fleet::cohorts::Outcome,
    node::Shared,
    session::sessions::SessionInfo,
    tasks,
};

/// Registers the session, answers 101, and spawns the session's task.
pub(super) async fn upgrade(
    shared: Shared,
    limiter: Arc<ConnectionLimiter>,
    mut stream: Transport,
    record: AttemptRecord,
    accepted: Accepted,
    share: Share,
) {
    // A client that left during the decision must not end its device's current session. Nothing waits between here and
    // the 101.
    if stream.has_left() {
        return record.count(Outcome::Abandoned);
    }
    let Accepted {
        hello,
        admitted,
        leftover,
        room,
    } = accepted;
    let mut first_bytes = answer::switching_protocols(&hello.websocket_key, hello.protocol.as_deref());
    let kind = hello.session_kind;
    let cohort = shared
        .cohorts
        .intern(admitted.model.as_deref(), hello.firmware.as_deref());
    cohort.claimed_as(CohortTag::of(hello.model.as_deref(), hello.firmware.as_deref()));
    let tenant = shared.cohorts.tenant(admitted.tenant());
    if let Some(previous) = admitted.resumed {
        // Another node may have issued it, whose clock is ahead of this one's.
        shared.sessions.ids().observe(previous, shared.clock.wall());
    }
    // Before the 101, so that a client that has read it finds the device online.
    let online = Online::begin(
        &shared,
        SessionInfo {
            device: hello.device,
            external_id: hello.external_id.map(Box::new),
            group: shared
                .history
                .groups()
                .of(&cohort, &tenant, admitted.grant.model.as_deref()),
            credential: (&admitted.grant.credential).into(),
            speaks_v1: kind == SessionKind::V1,
            address: record.peer().ip(),
            port: record.peer().port(),
            since: shared.clock.wall(),
            opened_at: shared.clock.now(),
        },
    );
    tasks::departures::handle_registered(&shared, online.session());
    // A plain session has no frame for a resume token.
    let mut grant = (kind == SessionKind::V1).then(|| Box::new(admitted.grant.clone()));
    if let Some(grant) = &mut grant {
        grant.tenant.share(&tenant);
        if let (Some(model), Some(shared)) = (&mut grant.model, &cohort.model) {
            model.share(shared);
        }
    }
    let mut machine = live::machine(&shared, &online, kind, grant.as_deref_mut());
    // The welcome goes with the 101 in one write and one packet, so that no device waits for it.
    live::say_at_once(&mut machine, &mut first_bytes);
    let written = answer::write(&shared, &mut stream, &first_bytes).await;
    if written.is_err() {
        online.cancel();
        return record.count(Outcome::Abandoned);
    }
    room.commit();
    record.admitted(cohort);
    if let Some(previous) = admitted.resumed {
        let session = online.session().id;
        tracing::debug!(device.id = %admitted.grant.device, session.id = %session, session.before = %previous, "session resumed by token");
        if !shared.resume.offer_revalidation(&admitted.grant, session) {
            shared.metrics.resume_revalidations.increment("dropped");
        }
    }
    let panics = Arc::clone(&shared.panics);
    let live = Live::open(online, machine, stream, &leftover, grant, share);
    limiter.spawn(&panics, live.run());
}
