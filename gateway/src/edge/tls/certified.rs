//! The device that a client certificate names: the UUID in its subject alternative names, or else in its common name.

use rustls::pki_types::CertificateDer;
use seawall_proto::{
    hello::Certified,
    id::{CertificateTag, Credential, DeviceId},
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

/// `None` if the certificate names no device: its holder may connect, and sends its device id in the request.
pub fn read(leaf: &CertificateDer<'_>) -> Option<Certified> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let alternatives = alternatives.iter().flat_map(|names| &names.value.general_names);
    let named = the_one(alternatives.filter_map(device_of)).or_else(|| {
        let names = certificate.subject().iter_common_name();
        the_one(names.filter_map(|name| name.as_str().ok()?.parse().ok()))
    })?;
    Some(named.map_or(Certified::Ambiguous, |device| Certified::Device {
        device,
        credential: Credential::of_certificate(
            leaf,
            CertificateTag::of(certificate.issuer().as_raw(), &certificate.serial.to_bytes_be()),
        ),
    }))
}

/// `Some(None)` if there are several.
fn the_one(mut devices: impl Iterator<Item = DeviceId>) -> Option<Option<DeviceId>> {
    let first = devices.next()?;
    Some(devices.all(|device| device == first).then_some(first))
}

/// `urn:uuid:…`, the last segment of any other URI, or the first label of a DNS name.
fn device_of(name: &GeneralName<'_>) -> Option<DeviceId> {
    let text = match name {
        GeneralName::URI(uri) => match uri.get(..9) {
            Some(scheme) if scheme.eq_ignore_ascii_case("urn:uuid:") => &uri[9..],
            Some(_) | None => uri.trim_end_matches('/').rsplit('/').next()?,
        },
        GeneralName::DNSName(name) => name.split('.').next()?,
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => return None,
    };
    text.parse().ok()
}
