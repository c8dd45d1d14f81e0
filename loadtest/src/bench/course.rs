//! What the devices do to one server, in order, and what that cost it. Start with [`Course::run`].

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use firmware_sim::tls::Tls;
use rustix::process::Pid;
use tokio::time::sleep;

use super::{
    Options,
    crowd::{By, Crowd},
    device::Account,
    messages::Sender,
    usage::{ProcessorTime, memory_bytes},
    witness::Witnesses,
};
use crate::{metrics::Ops, progress::Progress};

/// Connections under way where the cost of one is measured. Enough that look-ups are gathered, and few enough that memory is not a storm's.
const AT_ONCE: usize = 256;
/// Messages under way.
const MESSAGES_AT_ONCE: usize = 64;
/// Of each device, at most.
const MESSAGES_EACH: usize = 4;
/// Messages that are measured, in each direction: the gateway's event buffer takes some 8,000 in a minute, and then no more.
const MESSAGES_MAX: usize = 8_000;
/// Devices over TLS, at most: their side of it takes far more memory.
const TLS_DEVICES_MAX: usize = 5_000;
/// How often each device sends a heartbeat while they only hold.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// Time for a server to finish what it has begun, before it is looked at.
const SETTLE: Duration = Duration::from_secs(2);
/// A server's memory is read this often, and the least counts: an allocator gives back late.
const LOOKS_AT_MEMORY: u32 = 5;

/// One server's way through the bench.
pub(super) struct Course<'a> {
    pub name: &'static str,
    pub is_gateway: bool,
    pub accounts: &'a [Account],
    pub options: Options,
    pub progress: &'a Progress,
}

/// What a server needed. Times are of its processor, unless they say otherwise.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Pss with no device.
    pub base_bytes: f64,
    /// Growth of Pss for each idle device.
    pub device_bytes: f64,
    /// Pss after the storm, as a part of that before it.
    pub after_storm: f64,
    pub handshake_micros: f64,
    /// With a resume token; the echo knows none, and this is its plain handshake once more.
    pub resume_micros: f64,
    /// The growth of Pss and the processor time of a handshake over TLS.
    pub tls_device_bytes: Option<f64>,
    pub tls_handshake_micros: Option<f64>,
    /// From accept to the end of a connection that a rule refuses.
    pub refusal_micros: Option<f64>,
    /// A message of a device and what answers it.
    pub message_in_micros: f64,
    /// A message through the API, and its acknowledgement.
    pub message_out_micros: Option<f64>,
    /// A part of one core.
    pub hold_cores: f64,
    /// Until all devices are back after all connections were reset. By the clock on the wall.
    pub storm_seconds: f64,
    pub storm_micros: f64,
    /// The same, with resume tokens.
    pub resume_storm_seconds: f64,
    /// Until all devices are back that connect all sockets before they send the first request. By the clock on the wall.
    pub sockets_first_seconds: f64,
    /// The same, with resume tokens.
    pub sockets_first_resume_seconds: f64,
    /// By the clock on the wall.
    pub heartbeat_p99_millis: f64,
}

impl Course<'_> {
    /// Everything but refusals.
    ///
    /// # Errors
    /// The server died, or a device got an answer that it should not.
    pub async fn run(&self, server: SocketAddr, pid: Pid, ops: Option<&Ops>) -> Result<Measured> {
        let count = self.options.devices;
        let (accounts, witnesses) = self.accounts.split_at(count);
        let crowd = Crowd::new(server, self.is_gateway, accounts);
        let mut measured = Measured {
            base_bytes: memory(pid).await?,
            ..Measured::default()
        };

        self.say("devices connect");
        measured.handshake_micros = self.each(pid, count, crowd.connect(AT_ONCE, By::LookUp)).await?.0;
        let idle = memory(pid).await?;
        measured.device_bytes = (idle - measured.base_bytes) / count as f64;

        self.say("devices hold");
        let time = self.options.hold;
        let before = ProcessorTime::of(pid)?;
        crowd.hold(HEARTBEAT_EVERY, time).await?;
        measured.hold_cores = ProcessorTime::of(pid)?.since(&before).as_secs_f64() / time.as_secs_f64();

        self.say("a storm");
        let witnesses = Witnesses::start(server, self.is_gateway, witnesses).await?;
        let before = memory(pid).await?;
        witnesses.begin();
        let storm = async {
            crowd.drop_all().await;
            crowd.connect(count, By::LookUp).await
        };
        let took;
        (measured.storm_micros, took) = self.each(pid, count, storm).await?;
        measured.storm_seconds = took.as_secs_f64();
        measured.heartbeat_p99_millis = witnesses.p99().as_secs_f64() * 1000.0;
        let after = memory(pid).await?;
        measured.after_storm = after / before;

        self.say("a storm with resume tokens");
        crowd.drop_all().await;
        measured.resume_storm_seconds = crowd.connect(count, By::Token).await?.as_secs_f64();

        self.say("a storm that connects all sockets first");
        crowd.drop_all().await;
        measured.sockets_first_seconds = crowd.connect_sockets_first(By::LookUp).await?.as_secs_f64();
        crowd.drop_all().await;
        measured.sockets_first_resume_seconds = crowd.connect_sockets_first(By::Token).await?.as_secs_f64();

        self.say("devices send messages");
        let messages = (count * MESSAGES_EACH).min(MESSAGES_MAX);
        let asked = crowd.ask(MESSAGES_AT_ONCE, messages);
        measured.message_in_micros = self.each(pid, messages, asked).await?.0;
        if let Some(ops) = ops {
            self.say("devices get messages");
            let sent = self.messages_out(&crowd, ops, messages);
            measured.message_out_micros = Some(self.each(pid, messages, sent).await?.0);
        }

        self.say("devices resume");
        crowd.drop_all().await;
        sleep(SETTLE).await;
        measured.resume_micros = self.each(pid, count, crowd.connect(AT_ONCE, By::Token)).await?.0;
        crowd.drop_all().await;
        drop(witnesses);
        sleep(SETTLE).await;
        Ok(measured)
    }

    /// What it costs to refuse a device, in microseconds.
    ///
    /// # Errors
    /// A device was not refused.
    pub async fn refusals(&self, server: SocketAddr, pid: Pid) -> Result<f64> {
        self.say("devices are refused");
        let (accounts, _) = self.accounts.split_at(self.options.devices);
        let crowd = Crowd::new(server, self.is_gateway, accounts);
        Ok(self.each(pid, accounts.len(), crowd.be_refused(AT_ONCE)).await?.0)
    }

    /// What a device over TLS needs: bytes while it is idle, and microseconds to be let in.
    ///
    /// # Errors
    /// A device was not let in.
    pub async fn over_tls(&self, server: SocketAddr, pid: Pid, tls: Tls) -> Result<(f64, f64)> {
        self.say("devices connect over TLS");
        let count = self.options.devices.min(TLS_DEVICES_MAX);
        let crowd = Crowd::new(server, self.is_gateway, &self.accounts[..count]).over(tls);
        let before = memory(pid).await?;
        let (micros, _) = self.each(pid, count, crowd.connect(AT_ONCE, By::LookUp)).await?;
        let bytes = (memory(pid).await? - before) / count as f64;
        crowd.drop_all().await;
        Ok((bytes, micros))
    }

    async fn messages_out(&self, crowd: &Crowd, ops: &Ops, count: usize) -> Result<()> {
        let next = Arc::new(AtomicUsize::new(0));
        let mut senders = tokio::task::JoinSet::new();
        for _ in 0..MESSAGES_AT_ONCE {
            let (crowd, next) = (crowd.clone(), Arc::clone(&next));
            let mut sender = Sender::connect(ops).await?;
            senders.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return anyhow::Ok(());
                    }
                    let device = number % crowd.len();
                    let id = crowd.id(device).await;
                    let (sent, acknowledged) = tokio::join!(sender.send(id), crowd.acknowledge(device));
                    sent.and(acknowledged)?;
                }
            });
        }
        while let Some(done) = senders.join_next().await {
            done.context("a sender's task")??;
        }
        Ok(())
    }

    /// The server's processor time for each of `count` things, in microseconds, and what `work` returned.
    async fn each<T>(&self, pid: Pid, count: usize, work: impl Future<Output = Result<T>>) -> Result<(f64, T)> {
        let before = ProcessorTime::of(pid)?;
        let done = work.await.with_context(|| format!("measuring the {}", self.name))?;
        let used = ProcessorTime::of(pid)?.since(&before);
        Ok((used.as_secs_f64() * 1e6 / count as f64, done))
    }

    fn say(&self, what: &str) {
        self.progress.note(&format!("{}: {what}", self.name));
    }
}

/// The server's memory, once it has settled.
async fn memory(pid: Pid) -> Result<f64> {
    let mut least = u64::MAX;
    for _ in 0..LOOKS_AT_MEMORY {
        sleep(SETTLE / LOOKS_AT_MEMORY).await;
        least = least.min(memory_bytes(pid)?);
    }
    #[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
    Ok(least as f64)
}
