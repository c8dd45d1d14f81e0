//! TLS on the listeners: certificates, their reload without dropping anyone, and what client certificates say. Start with [`Endpoint`].
//!
//! rustls with ring, TLS 1.2 and 1.3, rustls's own tickets and no more. A session keeps the certificate that it began with; only
//! newcomers see new files. Files that can't be used change nothing but the log, a metric, `/readyz` and an alarm.

mod certified;
mod files;
mod follow;
mod inspect;

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ProducesTickets, ServerConnection},
};
use seawall_proto::{hello::Certified, time::WallTime};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

pub use self::{
    files::{ClientFiles, Digest, Files, Loaded, TlsError, provider},
    follow::{follow, reload_now},
    inspect::{Note, inspect},
};
use crate::{config::Config, transport::Transport};

/// A certificate that ends sooner is told to operators.
pub const EXPIRY_NOTICE: Duration = Duration::from_hours(14 * 24);

/// What rustls may hold for a peer that does not read, in bytes: as much as one of its records.
const BUFFER_LEN_MAX: usize = 16 * 1024;

/// The first byte of every TLS connection: the type of a handshake record (RFC 8446 §5.1).
const HANDSHAKE_RECORD: u8 = 0x16;

/// The listeners' TLS; `None` where one speaks plain TCP.
#[derive(Default)]
pub struct Tls {
    pub devices: Option<Endpoint>,
    pub ops: Option<Endpoint>,
}

impl Tls {
    /// # Errors
    /// A file can't be read or used.
    pub fn open(config: &Config) -> Result<Self, TlsError> {
        Ok(Self {
            devices: Files::of_devices(config).map(Endpoint::open).transpose()?,
            ops: Files::of_ops(config).map(Endpoint::open).transpose()?,
        })
    }

    /// Each with the name of its listener.
    pub fn endpoints(&self) -> impl Iterator<Item = (&'static str, &Endpoint)> {
        [("devices", &self.devices), ("ops", &self.ops)]
            .into_iter()
            .filter_map(|(listener, endpoint)| Some((listener, endpoint.as_ref()?)))
    }

    /// Why files of a listener could not be taken last time, where they could not.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.endpoints().find_map(|(_, endpoint)| endpoint.problem())
    }

    /// When the first certificate ends.
    #[must_use]
    pub fn expires(&self) -> Option<WallTime> {
        self.endpoints().map(|(_, endpoint)| endpoint.expires()).min()
    }
}

/// One listener's TLS, and the files that it is made from.
pub struct Endpoint {
    files: Files,
    /// Shared by all generations: a ticket outlives a renewed certificate.
    ticketer: Arc<dyn ProducesTickets>,
    current: ArcSwap<Loaded>,
    seen: Mutex<Seen>,
}

/// What the last looks at the files have found.
struct Seen {
    /// Last taken or refused: not looked at again until it changes.
    settled: Option<Digest>,
    /// Seen once: files are replaced one after the other, so that they are taken when two looks agree.
    once: Option<Digest>,
    problem: Option<String>,
}

/// Which files are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// Whatever is there: an operator has asked for it.
    Now,
    /// Those that have changed, and not since the last look.
    Changed,
}

/// What became of a look at the files.
#[derive(Debug)]
pub enum Reloaded {
    Unchanged,
    Taken,
    Refused(TlsError),
}

/// Why there is no TLS on a connection.
#[derive(Debug)]
pub enum NoTls {
    /// The peer speaks something else, HTTP by the looks of it: it can be told.
    Plain(TcpStream),
    /// The peer left without a byte.
    Silent,
    /// The handshake failed, or took too long.
    Failed(io::Error),
}

impl Endpoint {
    /// # Errors
    /// A file can't be read or used.
    pub fn open(files: Files) -> Result<Self, TlsError> {
        let ticketer = ring::Ticketer::new().map_err(|error| TlsError::System(error.to_string()))?;
        let contents = files.read()?;
        let loaded = contents.load(&ticketer)?;
        Ok(Self {
            current: ArcSwap::from_pointee(loaded),
            seen: Mutex::new(Seen {
                settled: Some(contents.digest()),
                once: None,
                problem: None,
            }),
            files,
            ticketer,
        })
    }

    /// Begins a handshake with the certificate of now.
    pub fn accept(&self, tcp: TcpStream) -> Accept<TcpStream> {
        let config: Arc<ServerConfig> = Arc::clone(&self.current.load().server);
        TlsAcceptor::from(config).accept_with(tcp, |connection| connection.set_buffer_limit(Some(BUFFER_LEN_MAX)))
    }

    /// A whole handshake, within this time.
    ///
    /// # Errors
    /// The peer speaks no TLS, or not in time.
    pub async fn accept_within(&self, tcp: TcpStream, time_max: Duration) -> Result<Transport, NoTls> {
        let handshake = async {
            let mut first = [0];
            match tcp.peek(&mut first).await {
                Ok(0) => Err(NoTls::Silent),
                Ok(_) if is_tls(first[0]) => Ok(self.accept(tcp).await.map_err(NoTls::Failed)?),
                Ok(_) => Err(NoTls::Plain(tcp)),
                Err(error) => Err(NoTls::Failed(error)),
            }
        };
        let tls = timeout(time_max, handshake)
            .await
            .map_err(|_| NoTls::Failed(io::ErrorKind::TimedOut.into()))??;
        Ok(Transport::Tls(Box::new(tls)))
    }

    /// Looks at the files, and takes them where they can be used. Blocks.
    pub fn reload(&self, which: Reload) -> Reloaded {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let read = self.files.read();
        let digest = read.as_ref().ok().map(files::Contents::digest);
        if which == Reload::Changed {
            if digest == seen.settled {
                seen.once = None;
                return Reloaded::Unchanged;
            }
            // Files that can't be read have no digest, and are told at once.
            if digest.is_some() && digest != seen.once {
                seen.once = digest;
                return Reloaded::Unchanged;
            }
        }
        seen.settled = digest;
        seen.once = None;
        match read.and_then(|contents| contents.load(&self.ticketer)) {
            Ok(loaded) => {
                self.current.store(Arc::new(loaded));
                seen.problem = None;
                Reloaded::Taken
            }
            Err(error) => {
                seen.problem = Some(error.to_string());
                Reloaded::Refused(error)
            }
        }
    }

    /// Why the files could not be taken last time, where they could not.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.problem.clone()
    }

    /// When the first of the certificates in use ends.
    #[must_use]
    pub fn expires(&self) -> WallTime {
        self.current.load().expires
    }
}

/// Whether a connection that begins with this byte is one of TLS.
#[must_use]
pub const fn is_tls(first: u8) -> bool {
    first == HANDSHAKE_RECORD
}

/// What the peer's certificate says of the device, where it showed one that names any.
#[must_use]
pub fn certified(tls: &TlsStream<TcpStream>) -> Option<Certified> {
    let connection: &ServerConnection = tls.get_ref().1;
    certified::read(connection.peer_certificates()?.first()?)
}
