//! The steps before the head of a request: the PROXY header of a load balancer, and TLS.

use std::{net::SocketAddr, pin::pin};

use seawall_proto::{hello::Certified, refusal::Limit};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    Early,
    deadline::{GivenUp, StepDeadline},
};
use crate::{
    edge::{
        limiter::{ConnectionLimiter, HandshakePermit, REJECTED_HEAD_TIME_MAX, Sent},
        proxy,
        tls::{self, Endpoint},
        transport::{Transport, has_unread},
    },
    node::Shared,
};

/// Why there is no request to read.
pub(super) enum NoRequest {
    /// The client cannot be answered.
    Early(Early),
    /// The client uses HTTP on a TLS listener: it can be answered.
    PlainHttp(Transport),
}

/// `limit` is the limit that already refuses its address.
fn given_up(outcome: &'static str, why: GivenUp, limit: Option<Limit>) -> NoRequest {
    let limit = match why {
        GivenUp::MadeWay => Some(limit.unwrap_or(Limit::AddressHandshakes)),
        GivenUp::TimedOut => limit,
    };
    NoRequest::Early(Early { outcome, limit })
}

fn silent() -> NoRequest {
    NoRequest::Early(Early::by_itself("silent"))
}

/// The origin in a load balancer's PROXY header; `None` if it names none, or the client sends no header.
///
/// # Errors
/// A header was required, but was not sent in time.
pub(super) async fn read_proxy_header(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    tcp: &TcpStream,
    peer: SocketAddr,
    permit: &mut HandshakePermit,
) -> Result<Option<SocketAddr>, NoRequest> {
    if !shared.proxies.sends_header(peer.ip()) {
        return Ok(None);
    }
    let time = shared.config.limits.head_timeout();
    let mut deadline = StepDeadline::begin(limiter, permit, time, time);
    let reading = Box::pin(wait_for(&mut deadline, proxy::read_header(tcp)));
    let read = tokio::select! {
        read = reading => read,
        () = limiter.closing.cancelled() => return Err(silent()),
    };
    match read {
        Ok(Ok(origin)) => Ok(origin),
        Ok(Err(error)) => {
            tracing::debug!(%error, peer.addr = %peer, "connection of a load balancer not readable");
            Err(NoRequest::Early(Early::by_itself("proxy_failed")))
        }
        Err(why) => Err(given_up("proxy_failed", why, None)),
    }
}

/// Runs the TLS handshake if the listener uses TLS. It holds a handshake permit, and has its own deadline.
pub(super) async fn secure(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    tcp: TcpStream,
    limit: Option<Limit>,
    permit: &mut HandshakePermit,
) -> Result<(Transport, Option<Certified>), NoRequest> {
    let Some(endpoint) = &shared.tls.devices else {
        return Ok((tcp.into(), None));
    };
    let time_usual = shared.config.tls.handshake_timeout();
    let time_max = limit.map_or(time_usual, |_| REJECTED_HEAD_TIME_MAX);
    let deadline = StepDeadline::begin(limiter, permit, time_max, time_usual);
    tokio::select! {
        arrived = Box::pin(shake_hands(endpoint, tcp, deadline, limit)) => arrived,
        () = limiter.closing.cancelled() => Err(silent()),
    }
}

async fn shake_hands(
    endpoint: &Endpoint,
    tcp: TcpStream,
    mut deadline: StepDeadline<'_>,
    limit: Option<Limit>,
) -> Result<(Transport, Option<Certified>), NoRequest> {
    let give_up = |outcome| move |why| given_up(outcome, why, limit);
    let mut first = [0];
    // Before any TLS state is allocated: a client that sends nothing costs no more than with plain TCP.
    let peeked = wait_for(&mut deadline, tcp.peek(&mut first)).await;
    match peeked.map_err(give_up("silent"))? {
        Ok(1..) if tls::is_tls(first[0]) => {}
        Ok(1..) => return Err(NoRequest::PlainHttp(tcp.into())),
        Ok(0) | Err(_) => return Err(silent()),
    }
    while !deadline.try_begin() {
        sleep(deadline.next_check()).await;
        deadline.check(Sent::Nothing, || false).map_err(give_up("tls_failed"))?;
    }
    let mut accept = endpoint.accept(tcp);
    loop {
        if let Ok(accepted) = timeout(deadline.next_check(), &mut accept).await {
            let tls = accepted.map_err(|error| {
                tracing::debug!(%error, "TLS handshake failed");
                NoRequest::Early(Early::by_itself("tls_failed"))
            })?;
            let certified = tls::certified(&tls);
            return Ok((tls.into(), certified));
        }
        let is_unread = || accept.get_ref().is_some_and(|io| has_unread(io.tcp()));
        deadline
            .check(Sent::Something, is_unread)
            .map_err(give_up("tls_failed"))?;
    }
}

/// Waits for a step until the deadline.
async fn wait_for<T>(deadline: &mut StepDeadline<'_>, step: impl Future<Output = T>) -> Result<T, GivenUp> {
    let mut step = pin!(step);
    loop {
        if let Ok(done) = timeout(deadline.next_check(), &mut step).await {
            return Ok(done);
        }
        deadline.check(Sent::Nothing, || false)?;
    }
}
