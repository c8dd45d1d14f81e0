//! Checks client certificates against revocation lists. Start with [`Verifier`].
//!
//! rustls has one rule for a whole chain: either each certificate in it needs a list, or none does. Here a device's
//! certificate needs the list of its CA. The CAs between it and the root are checked against the lists that exist.

use std::{cmp::Reverse, collections::HashSet, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use seawall_proto::{id::CertificateTag, time::WallTime};
use webpki::{
    CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList};

use super::files::wall;

/// Verifies chains of client certificates by roots and revocation lists.
#[derive(Debug)]
pub struct Verifier {
    /// Verifies everything except the chain.
    handshake: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    /// At least one. Of two lists of one CA the first is used.
    lists: Vec<CertRevocationList<'static>>,
}

impl Verifier {
    /// `handshake` verifies everything except the chain.
    ///
    /// # Errors
    /// One of the lists cannot be used.
    pub fn new(
        handshake: Arc<dyn ClientCertVerifier>,
        roots: Arc<RootCertStore>,
        algorithms: WebPkiSupportedAlgorithms,
        lists: &[CertificateRevocationListDer<'_>],
    ) -> Result<Self, webpki::Error> {
        let lists = newest_first(lists)
            .into_iter()
            .map(|list| OwnedCertRevocationList::from_der(list).map(CertRevocationList::Owned))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            handshake,
            roots,
            algorithms,
            lists,
        })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let leaf = EndEntityCert::try_from(leaf)?;
        let lists: Vec<_> = self.lists.iter().collect();
        let check = |depth, unknown| {
            let options = RevocationOptionsBuilder::new(&lists).map_err(|_| webpki::Error::UnknownRevocationStatus)?;
            leaf.verify_for_usage(
                self.algorithms.all,
                &self.roots.roots,
                intermediates,
                now,
                KeyUsage::client_auth(),
                Some(options.with_depth(depth).with_status_policy(unknown).build()),
                None,
            )
            .map(|_| ())
        };
        match check(RevocationCheckDepth::Chain, UnknownStatusPolicy::Deny) {
            // A list is missing in the chain. If it is missing for the device's certificate, the second check fails.
            // The third check rejects every certificate that is on a list.
            Err(webpki::Error::UnknownRevocationStatus) => {
                check(RevocationCheckDepth::EndEntity, UnknownStatusPolicy::Deny)?;
                check(RevocationCheckDepth::Chain, UnknownStatusPolicy::Allow)
            }
            verified => verified,
        }
    }
}

impl ClientCertVerifier for Verifier {
    fn offer_client_auth(&self) -> bool {
        self.handshake.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.handshake.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.handshake.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
            .map_err(|error| Error::InvalidCertificate(reason(error)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.handshake.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.handshake.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.handshake.supported_verify_schemes()
    }
}

/// The TLS alert for an error, if there is one (RFC 8446 §6.2).
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the library's errors are open-ended, and the rest share an alert"
)]
fn reason(error: webpki::Error) -> CertificateError {
    match error {
        webpki::Error::CertRevoked => CertificateError::Revoked,
        webpki::Error::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::CertExpired { .. } => CertificateError::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
}

/// An older list of a CA, before or after a newer one in the file, must not admit a certificate that the newer one
/// revokes.
fn newest_first<'a, 'b>(lists: &'a [CertificateRevocationListDer<'b>]) -> Vec<&'a CertificateRevocationListDer<'b>> {
    let mut lists: Vec<_> = lists.iter().collect();
    lists.sort_by_cached_key(|list| {
        let parsed = CertificateRevocationList::from_der(list).ok();
        Reverse(parsed.map(|(_, list)| list.last_update().timestamp()))
    });
    lists
}

/// Returns the certificates that these lists revoke: the newest list of each CA, as in [`Verifier`].
pub fn revoked(lists: &[CertificateRevocationListDer<'_>]) -> HashSet<CertificateTag> {
    let mut revoked = HashSet::new();
    let mut authorities = HashSet::new();
    for list in newest_first(lists) {
        if let Ok((_, list)) = CertificateRevocationList::from_der(list) {
            let certificates = list.iter_revoked_certificates();
            let issuer = list.issuer().as_raw();
            if !authorities.insert(issuer.to_vec()) {
                continue;
            }
            revoked.extend(certificates.map(|revoked| CertificateTag::of(issuer, &revoked.serial().to_bytes_be())));
        }
    }
    revoked
}

/// Time at which the first of these lists should be replaced; `None` if no list has one.
pub fn next_update(lists: &[CertificateRevocationListDer<'_>]) -> Option<WallTime> {
    lists
        .iter()
        .filter_map(|list| {
            let (_, list) = CertificateRevocationList::from_der(list).ok()?;
            list.next_update().map(wall)
        })
        .min()
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
        KeyUsagePurpose, SerialNumber, date_time_ymd,
    };

    use super::*;

    #[test]
    fn newest_list_of_an_authority_counts_wherever_it_stands_in_the_file() {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::CrlSign];
        let issuer = Issuer::new(params, KeyPair::generate().unwrap());
        let revoked_cert = || rcgen::RevokedCertParams {
            serial_number: SerialNumber::from(7),
            revocation_time: date_time_ymd(2025, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = |year| {
            let params = CertificateRevocationListParams {
                this_update: date_time_ymd(year, 1, 1),
                next_update: date_time_ymd(2100, 1, 1),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                // The newer list releases the certificate.
                revoked_certs: if year == 2025 { vec![revoked_cert()] } else { Vec::new() },
                key_identifier_method: KeyIdMethod::Sha256,
            };
            CertificateRevocationListDer::from(params.signed_by(&issuer).unwrap())
        };
        let [old, new] = [list(2025), list(2026)];

        for lists in [[old.clone(), new.clone()], [new.clone(), old.clone()]] {
            assert_eq!(newest_first(&lists), [&new, &old]);
            assert!(revoked(&lists).is_empty());
        }
        assert_eq!(revoked(&[old]).len(), 1);
    }
}
