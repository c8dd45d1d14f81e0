//! A CA for tests, its certificates in files, and clients that trust it.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::{
    ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use seawall_gateway::{
    edge::tls::{Endpoint, Files, provider},
    runtime::config::Config,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Host name in every certificate of a gateway here.
pub const HOST: &str = "gateway.test";

/// Issues certificates, and keeps their files until dropped.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Intermediates between its certificates and the root, as PEM.
    chain: String,
    files: tempfile::TempDir,
    last_serial: u64,
}

/// A certificate with its intermediates, and its key, as PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
    pub serial: SerialNumber,
}

impl Authority {
    pub fn new() -> Self {
        let params = authority_params("test authority");
        Self {
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(),
            chain: String::new(),
            files: tempfile::tempdir().unwrap(),
            last_serial: 0,
        }
    }

    /// A CA below this one, and the serial number of its certificate.
    pub fn below(&mut self, name: &str) -> (Self, SerialNumber) {
        self.last_serial += 1;
        let serial = SerialNumber::from(self.last_serial);
        let mut params = authority_params(name);
        params.serial_number = Some(serial.clone());
        let issuer = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &self.issuer).unwrap();
        let below = Self {
            chain: format!("{}{}", issuer.pem(), self.chain),
            issuer,
            files: tempfile::tempdir().unwrap(),
            last_serial: 0,
        };
        (below, serial)
    }

    /// A certificate of a gateway, or of any other server.
    pub fn server(&mut self) -> Identity {
        self.issue(CertificateParams::new(vec![HOST.to_owned(), "127.0.0.1".to_owned()]).unwrap())
    }

    /// An expired certificate of a gateway.
    pub fn ended_server(&mut self) -> Identity {
        let mut params = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
        params.not_after = date_time_ymd(2020, 1, 1);
        self.issue(params)
    }

    /// The CA's own certificate.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A device's certificate with this common name and these alternative names.
    pub fn client(&mut self, common_name: &str, names: Vec<SanType>) -> Identity {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.subject_alt_names = names;
        self.issue(params)
    }

    fn issue(&mut self, mut params: CertificateParams) -> Identity {
        self.last_serial += 1;
        let serial = SerialNumber::from(self.last_serial);
        params.serial_number = Some(serial.clone());
        let key = KeyPair::generate().unwrap();
        Identity {
            certificate: format!("{}{}", params.signed_by(&key, &self.issuer).unwrap().pem(), self.chain),
            key: key.serialize_pem(),
            serial,
        }
    }

    /// A list of these revoked certificates.
    pub fn revocations(&self, serials: &[&SerialNumber]) -> String {
        self.revocations_until(serials, 2099)
    }

    /// The same, with a next update at the beginning of this year.
    pub fn revocations_until(&self, serials: &[&SerialNumber], year: i32) -> String {
        let revoked = |serial: &&SerialNumber| RevokedCertParams {
            serial_number: (*serial).clone(),
            revocation_time: date_time_ymd(2025, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    pub fn write(&self, name: &str, pem: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, pem).unwrap();
        path
    }

    /// Writes a gateway's certificate to the place that [`settings`](Self::settings) names.
    pub fn write_server(&self, identity: &Identity) {
        self.write("gateway.pem", &identity.certificate);
        self.write("gateway.key", &identity.key);
    }

    /// `[tls]` with a certificate of this CA.
    pub fn settings(&mut self) -> String {
        let server = self.server();
        self.write_server(&server);
        self.write("ca.pem", &self.issuer.pem());
        format!(
            "[tls]\ncertificate = {:?}\nkey = {:?}\n",
            self.path("gateway.pem"),
            self.path("gateway.key")
        )
    }

    /// TLS of a listener, with a certificate of this CA.
    pub fn endpoint(&mut self) -> Endpoint {
        let config = Config::from_toml(&self.settings()).unwrap();
        Endpoint::open(Files::of_devices(&config).unwrap()).unwrap()
    }

    /// The same, with client certificates of this CA.
    pub fn settings_with_clients(&mut self) -> String {
        let settings = self.settings();
        format!("{settings}client_ca = {:?}\n", self.path("ca.pem"))
    }

    /// Configuration of a client that trusts this CA.
    pub fn client_config(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        identity: Option<&Identity>,
    ) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        Arc::new(match identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes());
                let chain = chain.collect::<Result<_, _>>().unwrap();
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        })
    }

    /// Starts TLS on an existing connection.
    pub async fn secure(&self, tcp: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let config = self.client_config(rustls::ALL_VERSIONS, None);
        TlsConnector::from(config)
            .connect(ServerName::try_from(HOST).unwrap(), tcp)
            .await
    }

    /// Connects with the newest version of TLS.
    pub async fn connect(
        &self,
        address: SocketAddr,
        identity: Option<&Identity>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let config = self.client_config(rustls::ALL_VERSIONS, identity);
        dial(config, address).await
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

pub async fn dial(config: Arc<ClientConfig>, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(HOST).unwrap();
    TlsConnector::from(config).connect(name, tcp).await
}

/// The serial number of the gateway's certificate, as its last byte.
pub fn serial_of(stream: &TlsStream<TcpStream>) -> u64 {
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    let (_, certificate) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    certificate.raw_serial().last().copied().unwrap().into()
}

pub fn version_of(stream: &TlsStream<TcpStream>) -> ProtocolVersion {
    stream.get_ref().1.protocol_version().unwrap()
}
