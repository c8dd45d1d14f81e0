//! How devices verify the gateway. Start with [`Trust`].

use std::{fs, io, path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

pub use crate::handshake::Stream;

/// Authorities that devices know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// CAs of this machine.
    #[default]
    System,
    /// CAs of a PEM file.
    File(PathBuf),
}

impl Trust {
    /// The CAs of this file; without one, those of this machine.
    #[must_use]
    pub fn in_file(path: Option<PathBuf>) -> Self {
        path.map_or(Self::System, Self::File)
    }

    /// Their certificates.
    ///
    /// # Errors
    /// The file can't be read, or holds no certificate.
    pub fn authorities(&self) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        let Self::File(path) = self else {
            return Ok(rustls_native_certs::load_native_certs().certs);
        };
        let unusable = |problem: String| TrustError {
            path: path.clone(),
            problem,
        };
        let pem = fs::read(path).map_err(|error| unusable(error.to_string()))?;
        CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<Vec<_>, _>>()
            .ok()
            .filter(|authorities| !authorities.is_empty())
            .ok_or_else(|| unusable("holds no certificate as PEM".into()))
    }
}

/// The file of CAs is invalid.
#[derive(Debug, thiserror::Error)]
#[error("the authorities in {}: {problem}", path.display())]
pub struct TrustError {
    path: PathBuf,
    problem: String,
}

/// What every device of a fleet makes its TLS connections with.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    /// For the gateway of this name. Each connection is a whole handshake: few devices keep tickets, and none over a restart.
    ///
    /// # Errors
    /// The authorities can't be read.
    pub fn new(name: ServerName<'static>, trust: &Trust) -> Result<Self, TrustError> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(trust.authorities()?);
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let mut config = builder
            .with_protocol_versions(&versions)
            .expect("ring has cipher suites for both versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Ok(Self {
            connector: Arc::new(config).into(),
            name,
        })
    }

    /// The handshake, over a connection that is there.
    ///
    /// # Errors
    /// The gateway is not the one that is looked for, or the connection broke.
    pub async fn connect(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.connector.connect(self.name.clone(), tcp).await
    }
}
