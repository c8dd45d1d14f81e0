//! What comes before the head of a request: a balancer's word on whom it speaks for, and TLS. Start with [`arrive`].

use std::{net::SocketAddr, pin::pin};

use seawall_proto::{hello::Certified, refusal::Limit};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::patience::{Hurry, Patience};
use crate::{
    door::{Door, Handshake, Sent, TURNED_HEAD_TIME_MAX},
    proxy,
    state::Shared,
    tls::{self, Endpoint},
    transport::{Transport, has_unread},
};

/// A connection whose request can be read.
pub(super) struct Arrived {
    pub(super) stream: Transport,
    /// What a client certificate says of the device.
    pub(super) certified: Option<Certified>,
}

/// A connection that never gets so far.
pub(super) enum Astray {
    /// Nothing can be said to it.
    Ended(Ended),
    /// It speaks HTTP to a listener that speaks TLS: it can be told.
    Plain(Transport),
}

/// How a connection ended to which nothing could be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// The label of `seawall_connections_total`.
    pub(super) outcome: &'static str,
    /// The limit that it was given up for, where there is one.
    pub(super) limit: Option<Limit>,
}

impl Ended {
    const fn by_itself(outcome: &'static str) -> Self {
        Self { outcome, limit: None }
    }

    /// `limit` is the one on its address, by which it is refused already.
    fn given_up(outcome: &'static str, why: Hurry, limit: Option<Limit>) -> Self {
        let limit = match why {
            Hurry::MakeWay => Some(limit.unwrap_or(Limit::AddressHandshakes)),
            Hurry::TimedOut => limit,
        };
        Self { outcome, limit }
    }
}

/// Whom a balancer that sends PROXY headers speaks for; `None` where it speaks for itself, or is no such balancer.
///
/// # Errors
/// It was to send a header, and did not, or not in time.
pub(super) async fn introduce(
    shared: &Shared,
    door: &Door,
    tcp: &TcpStream,
    peer: SocketAddr,
    handshake: &mut Handshake,
) -> Result<Option<SocketAddr>, Ended> {
    if !shared.proxies.sends_header(peer.ip()) {
        return Ok(None);
    }
    let time = shared.config.limits.head_timeout();
    let mut patience = Patience::begin(door, handshake, time, time);
    let reading = Box::pin(wait_for(&mut patience, proxy::read_header(tcp)));
    let read = tokio::select! {
        read = reading => read,
        () = door.closing.cancelled() => return Err(Ended::by_itself("silent")),
    };
    match read {
        Ok(Ok(origin)) => Ok(origin),
        Ok(Err(error)) => {
            tracing::debug!(%error, peer.addr = %peer, "a balancer's connection could not be read");
            Err(Ended::by_itself("proxy_failed"))
        }
        Err(why) => Err(Ended::given_up("proxy_failed", why, None)),
    }
}

/// Where the listener speaks TLS, its handshake. It holds a place at the door like the head, and has a time of its own.
pub(super) async fn arrive(
    shared: &Shared,
    door: &Door,
    tcp: TcpStream,
    limit: Option<Limit>,
    handshake: &mut Handshake,
) -> Result<Arrived, Astray> {
    let Some(endpoint) = &shared.tls.devices else {
        return Ok(Arrived {
            stream: tcp.into(),
            certified: None,
        });
    };
    let time_usual = shared.config.tls.handshake_timeout();
    let time_max = limit.map_or(time_usual, |_| TURNED_HEAD_TIME_MAX);
    let patience = Patience::begin(door, handshake, time_max, time_usual);
    tokio::select! {
        arrived = Box::pin(secure(endpoint, tcp, patience, limit)) => arrived,
        () = door.closing.cancelled() => Err(Astray::Ended(Ended::by_itself("silent"))),
    }
}

async fn secure(
    endpoint: &Endpoint,
    tcp: TcpStream,
    mut patience: Patience<'_>,
    limit: Option<Limit>,
) -> Result<Arrived, Astray> {
    let give_up = |outcome| move |why| Astray::Ended(Ended::given_up(outcome, why, limit));
    let mut first = [0];
    // Before anything is set up for it: a peer that sends nothing costs no more than on plain TCP.
    let peeked = wait_for(&mut patience, tcp.peek(&mut first)).await;
    match peeked.map_err(give_up("silent"))? {
        Ok(1..) if tls::is_tls(first[0]) => {}
        Ok(1..) => return Err(Astray::Plain(tcp.into())),
        Ok(0) | Err(_) => return Err(Astray::Ended(Ended::by_itself("silent"))),
    }
    while !patience.try_begin() {
        sleep(patience.span()).await;
        patience.look(Sent::Nothing, || false).map_err(give_up("tls_failed"))?;
    }
    let mut accept = endpoint.accept(tcp);
    loop {
        if let Ok(accepted) = timeout(patience.span(), &mut accept).await {
            let tls = accepted.map_err(|error| {
                tracing::debug!(%error, "a TLS handshake failed");
                Astray::Ended(Ended::by_itself("tls_failed"))
            })?;
            let certified = tls::certified(&tls);
            return Ok(Arrived {
                stream: tls.into(),
                certified,
            });
        }
        let is_unread = || accept.get_ref().is_some_and(|io| has_unread(io.tcp()));
        patience
            .look(Sent::Something, is_unread)
            .map_err(give_up("tls_failed"))?;
    }
}

/// Waits for one thing as long as patience lasts.
async fn wait_for<T>(patience: &mut Patience<'_>, step: impl Future<Output = T>) -> Result<T, Hurry> {
    let mut step = pin!(step);
    loop {
        if let Ok(done) = timeout(patience.span(), &mut step).await {
            return Ok(done);
        }
        patience.look(Sent::Nothing, || false)?;
    }
}
