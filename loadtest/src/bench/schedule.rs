//! Schedule of one server's measurements: what the devices do, in order, and what it costs. Start with
//! [`Schedule::run`].

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
    bystanders::Bystanders,
    device::Account,
    messages::Sender,
    pool::{By, DevicePool},
    usage::{ProcessorTime, memory_bytes},
};
use crate::{metrics::Ops, progress::Progress};

/// Concurrent handshakes while the cost of one is measured. Enough for batches of lookups, and too few for a storm's
/// memory.
const AT_ONCE: usize = 256;
/// Concurrent messages.
const MESSAGES_AT_ONCE: usize = 64;
/// Maximum number of messages of each device.
const MESSAGES_EACH: usize = 4;
/// Maximum number of messages in each direction. The gateway's event buffer takes about 8,000 per minute.
const MESSAGES_MAX: usize = 8_000;
/// Maximum number of devices over TLS: a TLS client takes far more memory.
const TLS_DEVICES_MAX: usize = 5_000;
/// Time between two heartbeats of a device while devices only hold.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// Time for a server to finish its work before it is measured.
const SETTLE: Duration = Duration::from_secs(2);
/// Number of samples of a server's memory, of which the least is used: an allocator returns memory late.
const LOOKS_AT_MEMORY: u32 = 5;

/// Measurements of one server.
pub(super) struct Schedule<'a> {
    pub name: &'static str,
    pub is_gateway: bool,
    pub accounts: &'a [Account],
    pub options: Options,
    pub progress: &'a Progress,
}

/// Results for one server. Times are processor times unless stated otherwise.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Pss with no device.
    pub base_bytes: f64,
    /// Growth of Pss for each idle device.
    pub device_bytes: f64,
    /// Pss after the storm, as a part of that before it.
    pub after_storm: f64,
    pub handshake_micros: f64,
    /// Handshake with a resume token. The echo server has none, so this is its plain handshake again.
    pub resume_micros: f64,
    /// The growth of Pss and the processor time of a handshake over TLS.
    pub tls_device_bytes: Option<f64>,
    pub tls_handshake_micros: Option<f64>,
    /// A connection that a rule refuses, from accept to its end.
    pub refusal_micros: Option<f64>,
    /// A message of a device and its answer.
    pub message_in_micros: f64,
    /// A message through the API, and its acknowledgement.
    pub message_out_micros: Option<f64>,
    /// A part of one core.
    pub hold_cores: f64,
    /// Wall-clock time from the reset of all connections to the return of all devices.
    pub storm_seconds: f64,
    pub storm_micros: f64,
    /// The same, with resume tokens.
    pub resume_storm_seconds: f64,
    /// Wall-clock time until all devices are back that connect all sockets before they send the first request.
    pub sockets_first_seconds: f64,
    /// The same, with resume tokens.
    pub sockets_first_resume_seconds: f64,
    /// Wall-clock time.
    pub heartbeat_p99_millis: f64,
}

impl Schedule<'_> {
    /// Measures everything but refusals.
    ///
    /// # Errors
    /// The server died, or a device got an answer that it should not.
    pub async fn run(&self, server: SocketAddr, pid: Pid, ops: Option<&Ops>) -> Result<Measured> {
        let count = self.options.devices;
        let (accounts, bystanders) = self.accounts.split_at(count);
        let pool = DevicePool::new(server, self.is_gateway, accounts);
        let mut measured = Measured {
            base_bytes: memory(pid).await?,
            ..Measured::default()
        };

        self.say("devices connect");
        measured.handshake_micros = self.each(pid, count, pool.connect(AT_ONCE, By::LookUp)).await?.0;
        let idle = memory(pid).await?;
        measured.device_bytes = (idle - measured.base_bytes) / count as f64;

        self.say("devices hold");
        let time = self.options.hold;
        let before = ProcessorTime::of(pid)?;
        pool.hold(HEARTBEAT_EVERY, time).await?;
        measured.hold_cores = ProcessorTime::of(pid)?.since(&before).as_secs_f64() / time.as_secs_f64();

        self.say("a storm");
        let bystanders = Bystanders::start(server, self.is_gateway, bystanders).await?;
        let before = memory(pid).await?;
        bystanders.begin();
        let storm = async {
            pool.drop_all().await;
            pool.connect(count, By::LookUp).await
        };
        let took;
        (measured.storm_micros, took) = self.each(pid, count, storm).await?;
        measured.storm_seconds = took.as_secs_f64();
        measured.heartbeat_p99_millis = bystanders.p99().as_secs_f64() * 1000.0;
        let after = memory(pid).await?;
        measured.after_storm = after / before;

        self.say("a storm with resume tokens");
        pool.drop_all().await;
        measured.resume_storm_seconds = pool.connect(count, By::Token).await?.as_secs_f64();

        self.say("a storm that connects all sockets first");
        pool.drop_all().await;
        measured.sockets_first_seconds = pool.connect_sockets_first(By::LookUp).await?.as_secs_f64();
        pool.drop_all().await;
        measured.sockets_first_resume_seconds = pool.connect_sockets_first(By::Token).await?.as_secs_f64();

        self.say("devices send messages");
        let messages = (count * MESSAGES_EACH).min(MESSAGES_MAX);
        let asked = pool.ask(MESSAGES_AT_ONCE, messages);
        measured.message_in_micros = self.each(pid, messages, asked).await?.0;
        if let Some(ops) = ops {
            self.say("devices get messages");
            let sent = self.messages_out(&pool, ops, messages);
            measured.message_out_micros = Some(self.each(pid, messages, sent).await?.0);
        }

        self.say("devices resume");
        pool.drop_all().await;
        sleep(SETTLE).await;
        measured.resume_micros = self.each(pid, count, pool.connect(AT_ONCE, By::Token)).await?.0;
        pool.drop_all().await;
        drop(bystanders);
        sleep(SETTLE).await;
        Ok(measured)
    }

    /// Measures the processor time to refuse a device, in microseconds.
    ///
    /// # Errors
    /// A device was not refused.
    pub async fn refusals(&self, server: SocketAddr, pid: Pid) -> Result<f64> {
        self.say("devices are refused");
        let (accounts, _) = self.accounts.split_at(self.options.devices);
        let pool = DevicePool::new(server, self.is_gateway, accounts);
        Ok(self.each(pid, accounts.len(), pool.be_refused(AT_ONCE)).await?.0)
    }

    /// What a device over TLS needs: bytes while it is idle, and microseconds to be admitted.
    ///
    /// # Errors
    /// A device was not admitted.
    pub async fn over_tls(&self, server: SocketAddr, pid: Pid, tls: Tls) -> Result<(f64, f64)> {
        self.say("devices connect over TLS");
        let count = self.options.devices.min(TLS_DEVICES_MAX);
        let pool = DevicePool::new(server, self.is_gateway, &self.accounts[..count]).over(tls);
        let before = memory(pid).await?;
        let (micros, _) = self.each(pid, count, pool.connect(AT_ONCE, By::LookUp)).await?;
        let bytes = (memory(pid).await? - before) / count as f64;
        pool.drop_all().await;
        Ok((bytes, micros))
    }

    async fn messages_out(&self, pool: &DevicePool, ops: &Ops, count: usize) -> Result<()> {
        let next = Arc::new(AtomicUsize::new(0));
        let mut senders = tokio::task::JoinSet::new();
        for _ in 0..MESSAGES_AT_ONCE {
            let (pool, next) = (pool.clone(), Arc::clone(&next));
            let mut sender = Sender::connect(ops).await?;
            senders.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return anyhow::Ok(());
                    }
                    let device = number % pool.len();
                    let id = pool.id(device).await;
                    let (sent, acknowledged) = tokio::join!(sender.send(id), pool.acknowledge(device));
                    sent.and(acknowledged)?;
                }
            });
        }
        while let Some(done) = senders.join_next().await {
            done.context("a sender's task")??;
        }
        Ok(())
    }

    /// Measures the server's processor time for each of `count` units of `work`, in microseconds. Returns it with the
    /// work's result.
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

/// Measures the server's memory once it has settled.
async fn memory(pid: Pid) -> Result<f64> {
    let mut least = u64::MAX;
    for _ in 0..LOOKS_AT_MEMORY {
        sleep(SETTLE / LOOKS_AT_MEMORY).await;
        least = least.min(memory_bytes(pid)?);
    }
    #[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
    Ok(least as f64)
}
