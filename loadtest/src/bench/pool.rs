//! A pool of benchmark devices, and what they do together. Start with [`DevicePool`].

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use firmware_sim::tls::Tls;
use tokio::{
    net::TcpStream,
    sync::{Barrier, Mutex, MutexGuard},
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};

use super::{
    FIRMWARE, FIRMWARE_BLOCKED,
    device::{Account, Answer, Device, Request},
};

/// Maximum duration of anything that a device does.
const TIME_MAX: Duration = Duration::from_secs(120);
/// Time until a device retries a connection that the server could not accept.
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// Devices of one server.
#[derive(Clone)]
pub struct DevicePool {
    server: SocketAddr,
    is_gateway: bool,
    tls: Option<Tls>,
    entries: Arc<[Mutex<Entry>]>,
}

struct Entry {
    account: Account,
    device: Option<Device>,
    resume: Option<String>,
}

/// How devices are admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    LookUp,
    Token,
}

impl DevicePool {
    pub fn new(server: SocketAddr, is_gateway: bool, accounts: &[Account]) -> Self {
        let entry = |account: &Account| {
            Mutex::new(Entry {
                account: account.clone(),
                device: None,
                resume: None,
            })
        };
        Self {
            server,
            is_gateway,
            tls: None,
            entries: accounts.iter().map(entry).collect(),
        }
    }

    /// Returns the same devices, over TLS.
    pub fn over(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Connects all, `at_once` at a time. Refused devices return when they were told to. Returns how long it took.
    pub async fn connect(&self, at_once: usize, by: By) -> Result<Duration> {
        let begun = Instant::now();
        let pool = self.clone();
        run(at_once, self.len(), move |index| {
            let pool = pool.clone();
            async move { pool.connect_one(index, by, None).await }
        })
        .await?;
        Ok(begun.elapsed())
    }

    /// Connects all sockets first. The devices send their requests when the last socket is connected, so that the
    /// server holds all of them without a request for a while. Refused devices return when they were told to.
    /// Returns the time from the first socket to the last session.
    pub async fn connect_sockets_first(&self, by: By) -> Result<Duration> {
        let begun = Instant::now();
        let (pool, connected) = (self.clone(), Arc::new(Barrier::new(self.len())));
        run(self.len(), self.len(), move |index| {
            let (pool, connected) = (pool.clone(), Arc::clone(&connected));
            async move {
                let tcp = pool.dial(index).await?;
                connected.wait().await;
                pool.connect_one(index, by, Some(tcp)).await
            }
        })
        .await?;
        Ok(begun.elapsed())
    }

    /// Connects every device with a blocked firmware. Fails unless a rule refuses each.
    pub async fn be_refused(&self, at_once: usize) -> Result<()> {
        let pool = self.clone();
        run(at_once, self.len(), move |index| {
            let pool = pool.clone();
            async move {
                let entry = pool.entry(index).await;
                let request = pool.request(&entry.account, FIRMWARE_BLOCKED);
                match Device::connect(request).await? {
                    Answer::Refused(403) => Ok(()),
                    Answer::Refused(status) => bail!("a device that a rule refuses got {status}"),
                    Answer::Connected { .. } | Answer::Later { .. } => bail!("a device was not refused by its rule"),
                }
            }
        })
        .await
    }

    /// Resets all connections.
    pub async fn drop_all(&self) {
        for entry in &*self.entries {
            if let Some(device) = entry.lock().await.device.take() {
                device.reset();
            }
        }
    }

    /// Sends `count` messages, from the devices in turn, and waits for the answers.
    pub async fn ask(&self, at_once: usize, count: usize) -> Result<()> {
        let pool = self.clone();
        run(at_once, count, move |number| {
            let pool = pool.clone();
            async move {
                let index = number % pool.len();
                let text = format!(r#"{{"type":"message","id":"{index}","topic":"t","payload":{{"n":{index}}}}}"#);
                pool.entry(index).await.device()?.ask(&text).await
            }
        })
        .await
    }

    /// Waits for a message to a device, and acknowledges it.
    pub async fn acknowledge(&self, index: usize) -> Result<()> {
        let mut entry = self.entry(index).await;
        let device = entry.device()?;
        let message = device.text().await?;
        let message: serde_json::Value = serde_json::from_slice(&message).context("reading a message")?;
        let id = message["id"].as_str().context("a message without an id")?;
        device.say(&format!(r#"{{"type":"ack","id":"{id}"}}"#)).await
    }

    /// Sends a heartbeat from each device at the interval `every`, evenly spread over the devices, for `time`.
    pub async fn hold(&self, every: Duration, time: Duration) -> Result<()> {
        let begun = tokio::time::Instant::now();
        let step = every.div_f64(self.len() as f64);
        let mut under_way = JoinSet::new();
        for beat in 0.. {
            let at = step.mul_f64(f64::from(beat));
            if at >= time {
                break;
            }
            sleep_until(begun + at).await;
            let (pool, index) = (self.clone(), beat as usize % self.len());
            under_way.spawn(async move { pool.heartbeat(index).await });
            while let Some(done) = under_way.try_join_next() {
                done??;
            }
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        Ok(())
    }

    /// Sends a ping and waits for its pong.
    pub async fn heartbeat(&self, index: usize) -> Result<()> {
        let mut entry = self.entry(index).await;
        timeout(TIME_MAX, entry.device()?.ping())
            .await
            .context("a heartbeat without an answer")?
    }

    pub async fn id(&self, index: usize) -> uuid::Uuid {
        self.entry(index).await.account.id
    }

    /// Opens the TCP connection of a device.
    async fn dial(&self, index: usize) -> Result<TcpStream> {
        let entry = self.entry(index).await;
        let begun = Instant::now();
        loop {
            match Device::dial(&self.request(&entry.account, FIRMWARE)).await {
                Ok(tcp) => return Ok(tcp),
                Err(error) if begun.elapsed() > TIME_MAX => return Err(error),
                Err(_) => sleep(AGAIN_AFTER).await,
            }
        }
    }

    /// Until the device is admitted. `tcp` is the connection of its first attempt, where it is there already.
    async fn connect_one(&self, index: usize, by: By, mut tcp: Option<TcpStream>) -> Result<()> {
        let mut entry = self.entry(index).await;
        let begun = Instant::now();
        let mut slot = None;
        loop {
            ensure!(
                begun.elapsed() < TIME_MAX,
                "a device was not admitted within {TIME_MAX:?}"
            );
            let request = Request {
                slot: slot.as_deref(),
                resume: entry.resume.as_deref().filter(|_| by == By::Token),
                ..self.request(&entry.account, FIRMWARE)
            };
            let answer = match tcp.take() {
                Some(tcp) => Device::send_request(tcp, request).await,
                None => Device::connect(request).await,
            };
            match answer {
                Ok(Answer::Connected { device, resume }) => {
                    entry.device = Some(device);
                    entry.resume = resume.or(entry.resume.take());
                    return Ok(());
                }
                Ok(Answer::Later { after, slot: given }) => {
                    slot = given;
                    sleep(after).await;
                }
                Ok(Answer::Refused(status)) => bail!("a device got {status}"),
                Err(_) => sleep(AGAIN_AFTER).await,
            }
        }
    }

    fn request<'a>(&'a self, account: &'a Account, firmware: &'a str) -> Request<'a> {
        Request {
            server: self.server,
            tls: self.tls.as_ref(),
            account,
            firmware,
            slot: None,
            resume: None,
            awaits_welcome: self.is_gateway,
        }
    }

    async fn entry(&self, index: usize) -> MutexGuard<'_, Entry> {
        self.entries[index].lock().await
    }
}

/// Runs `work` for each number below `count`, `at_once` of them at a time.
async fn run<W>(at_once: usize, count: usize, work: impl Fn(usize) -> W + Clone + Send + 'static) -> Result<()>
where
    W: Future<Output = Result<()>> + Send,
{
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..at_once.min(count) {
        let (next, work) = (Arc::clone(&next), work.clone());
        workers.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(());
                }
                timeout(TIME_MAX, work(number)).await.context("a device hangs")??;
            }
        });
    }
    while let Some(done) = workers.join_next().await {
        done.context("a device's task")??;
    }
    Ok(())
}

impl Entry {
    fn device(&mut self) -> Result<&mut Device> {
        self.device.as_mut().context("the device is not connected")
    }
}
