//! NBD over TLS as operators and other people's clients see it: nbdinfo, nbdcopy, qemu-img. Left out by name where they
//! are not installed. Must not know the library.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tempfile::TempDir;

use crate::disk::{Disk, assert_same};
use crate::site::{Ran, Site, run, text};
use crate::tools::is_missing;

/// An authority, and its directory as GnuTLS's programs (libnbd, QEMU) want it: ca-cert.pem, client-cert.pem and
/// client-key.pem.
struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Authority {
        let dir = folder.join(name);
        std::fs::create_dir(&dir).expect("a directory");
        let mut params = CertificateParams::new([]).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        std::fs::write(dir.join("ca-cert.pem"), certificate.pem()).expect("writes");
        Authority { dir, issuer: Issuer::new(params, key) }
    }

    /// Writes `{who}-cert.pem` and `{who}-key.pem`.
    fn sign(&self, who: &str, usage: ExtendedKeyUsagePurpose) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, who);
        // No key usage, as in docs/nbd.md: where there is one, QEMU before 10.2 insists on key encipherment, which an
        // elliptic curve cannot do.
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        std::fs::write(self.dir.join(format!("{who}-cert.pem")), certificate.pem()).expect("writes");
        let path = self.dir.join(format!("{who}-key.pem"));
        std::fs::write(&path, key.serialize_pem()).expect("writes");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("sets the mode");
    }
}

/// A site that serves volume `vm` over TLS, and directories of those who may and may not come in.
struct Served {
    site: Site,
    disk: Disk,
    /// With a client's certificate.
    friend: PathBuf,
    /// Trusts the server, and has no certificate.
    nobody: PathBuf,
    folder: TempDir,
}

/// `lines` are for `[nbd]`, besides certificate and key.
fn serve(lines: &str) -> Served {
    let folder = tempfile::Builder::new().prefix("ferry").tempdir().expect("a directory");
    let authority = Authority::new(folder.path(), "pki");
    authority.sign("server", ExtendedKeyUsagePurpose::ServerAuth);
    authority.sign("client", ExtendedKeyUsagePurpose::ClientAuth);
    let nobody = folder.path().join("nobody");
    std::fs::create_dir(&nobody).expect("a directory");
    std::fs::copy(authority.dir.join("ca-cert.pem"), nobody.join("ca-cert.pem")).expect("copies");
    let mut site = Site::new(folder.path(), "a");
    let file = |name: &str| authority.dir.join(name).display().to_string();
    site.nbd_lines = format!(
        "tls_certificate = \"{}\"\ntls_key = \"{}\"\n{}",
        file("server-cert.pem"),
        file("server-key.pem"),
        lines.replace("CA", &file("ca-cert.pem")),
    );
    site.start();
    let disk = Disk::mixed(50, 200, 3 * 512);
    let image = folder.path().join("vm.raw");
    disk.write_to(&image);
    site.ok(&["volume", "add", "vm", "--image", text(&image)]);
    Served { site, disk, friend: authority.dir, nobody, folder }
}

impl Served {
    fn port(&self) -> u16 {
        self.site.nbd_tcp.expect("NBD is served by TCP").port()
    }

    /// With the credentials in `dir`, over TCP.
    fn uri(&self, dir: &Path) -> String {
        format!("nbds://localhost:{}/vm?tls-certificates={}", self.port(), dir.display())
    }

    fn unix_uri(&self, dir: &Path) -> String {
        format!("nbds+unix:///vm?socket={}&tls-certificates={}", self.site.socket().display(), dir.display())
    }

    /// A program of QEMU's with the credentials in `dir`, over TCP.
    fn qemu(&self, program: &str, args: &[&str], dir: &Path) -> Command {
        let image = format!("driver=nbd,host=localhost,port={},export=vm,tls-creds=tls", self.port());
        let mut command = Command::new(program);
        command.args(args).arg("--object");
        command.arg(format!("tls-creds-x509,id=tls,endpoint=client,dir={}", dir.display()));
        command.args(["--image-opts", &image]);
        command
    }

    fn qemu_img(&self, args: &[&str], dir: &Path) -> Ran {
        run(&mut self.qemu("qemu-img", args, dir))
    }
}

fn has_no_tls(test: &str) -> bool {
    let libnbd = run(Command::new("nbdinfo").args(["--can", "connect", "nbds+unix:///?socket=/nowhere"]));
    let without = libnbd.err.contains("TLS") && libnbd.err.contains("not");
    if without {
        crate::site::skipped(test, "nbdinfo was built without TLS");
    }
    without
}

#[track_caller]
fn assert_fine(ran: &Ran, what: &str) {
    assert!(ran.status.success(), "{what}: {} {}{}", ran.status, ran.out, ran.err);
}

#[track_caller]
fn assert_refused(ran: &Ran, what: &str) {
    assert!(!ran.status.success(), "{what} was let in: {}{}", ran.out, ran.err);
}

#[test]
fn libnbd_speaks_tls_where_it_is_required() {
    let test = "libnbd_speaks_tls_where_it_is_required";
    if is_missing(test, "nbdinfo") || is_missing(test, "nbdcopy") || has_no_tls(test) {
        return;
    }
    let served = serve("tls = \"required\"");
    for uri in [served.uri(&served.nobody), served.unix_uri(&served.nobody), served.uri(&served.friend)] {
        let info = run(Command::new("nbdinfo").arg("--json").arg(&uri));
        assert_fine(&info, &uri);
        let info: serde_json::Value = serde_json::from_str(&info.out).expect("nbdinfo --json is JSON");
        assert_eq!(info["TLS"], true, "{info}");
        assert_eq!(info["exports"][0]["export-size"], served.disk.bytes.len());
    }
    let list = run(Command::new("nbdinfo").arg("--list").arg(served.uri(&served.nobody)));
    assert_fine(&list, "nbdinfo --list");
    assert!(list.out.contains("vm"), "{}", list.out);
    let copy = served.folder.path().join("copy.raw");
    assert_fine(&run(Command::new("nbdcopy").arg(served.uri(&served.nobody)).arg(&copy)), "nbdcopy out");
    assert_same("nbdcopy's file", &std::fs::read(&copy).expect("reads"), &served.disk.bytes);
    let other = Disk::noisy(51, 200);
    let image = served.folder.path().join("other.raw");
    std::fs::write(&image, &other.bytes[..1 << 20]).expect("writes");
    let into = Command::new("nbdcopy").arg("--flush").arg(&image).arg(served.unix_uri(&served.nobody)).output();
    assert!(into.expect("nbdcopy runs").status.success(), "nbdcopy in");
    assert_fine(&run(Command::new("nbdcopy").arg(served.uri(&served.nobody)).arg(&copy)), "nbdcopy out again");
    let read = std::fs::read(&copy).expect("reads");
    assert_same("what was written", &read[..1 << 20], &other.bytes[..1 << 20]);

    let plain = run(Command::new("nbdinfo").arg(format!("nbd://localhost:{}/vm", served.port())));
    assert_refused(&plain, "a client without TLS");
    let size = run(Command::new("nbdinfo").arg("--size").arg(served.uri(&served.friend)));
    assert_eq!(size.out.trim(), served.disk.bytes.len().to_string());
}

#[test]
fn clients_without_the_certificate_stay_outside() {
    let test = "clients_without_the_certificate_stay_outside";
    if is_missing(test, "nbdinfo") || has_no_tls(test) {
        return;
    }
    let served = serve("tls = \"required\"\ntls_client_ca = \"CA\"");
    let info = |dir: &Path| run(Command::new("nbdinfo").arg("--size").arg(served.uri(dir)));
    assert_fine(&info(&served.friend), "a client with a certificate");
    assert_refused(&info(&served.nobody), "a client without one");
    // It trusts the server, and shows a certificate of its own making.
    let stranger = Authority::new(served.folder.path(), "stranger");
    stranger.sign("client", ExtendedKeyUsagePurpose::ClientAuth);
    std::fs::copy(served.nobody.join("ca-cert.pem"), stranger.dir.join("ca-cert.pem")).expect("copies");
    assert_refused(&info(&stranger.dir), "a stranger");
    assert_fine(&info(&served.friend), "the first again");
}

#[test]
fn qemu_img_speaks_tls() {
    if is_missing("qemu_img_speaks_tls", "qemu-img") {
        return;
    }
    let served = serve("tls = \"required\"\ntls_client_ca = \"CA\"");
    let info = served.qemu_img(&["info", "--output=json"], &served.friend);
    assert_fine(&info, "qemu-img info");
    let info: serde_json::Value = serde_json::from_str(&info.out).expect("qemu-img info is JSON");
    assert_eq!(info["virtual-size"], served.disk.bytes.len());
    if !is_missing("qemu_img_speaks_tls", "qemu-io") {
        let commands = ["write -P 0x5a 1M 3M", "write -f -P 0xa5 5120 512", "flush", "read -P 0x5a 1M 3M"];
        let mut qemu_io = served.qemu("qemu-io", &commands.map(|command| ["-c", command]).concat(), &served.friend);
        let ran = run(&mut qemu_io);
        assert_fine(&ran, "qemu-io");
        assert!(!ran.out.contains("failed"), "{}", ran.out);
        let bytes = std::fs::read(served.folder.path().join("vm.raw")).expect("reads");
        assert!(bytes[1 << 20..4 << 20].iter().all(|byte| *byte == 0x5a), "what was written is in the image");
    }
    assert_refused(&served.qemu_img(&["info"], &served.nobody), "qemu-img without a certificate");
}

/// What docs/nbd.md tells to type, up to the clients' directory.
fn recipe() -> String {
    let text = include_str!("../../docs/nbd.md");
    let (_, section) = text.split_once("### Making certificates").expect("the section is there");
    let (section, _) = section.split_once("\n#").expect("another one follows");
    let blocks: Vec<&str> = section.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 3, "an authority, a server and a client");
    blocks.concat()
}

#[test]
fn certificates_made_as_the_document_says_are_accepted() {
    let test = "certificates_made_as_the_document_says_are_accepted";
    if is_missing(test, "openssl") {
        return;
    }
    let folder = tempfile::Builder::new().prefix("ferry").tempdir().expect("a directory");
    let made = run(Command::new("sh").args(["-ec", &recipe()]).current_dir(folder.path()));
    assert_fine(&made, "the recipe");
    let mut site = Site::new(folder.path(), "a");
    let file = |name: &str| folder.path().join(name).display().to_string();
    site.nbd_lines = format!(
        "tls = \"required\"\ntls_certificate = \"{}\"\ntls_key = \"{}\"\ntls_client_ca = \"{}\"",
        file("nbd-cert.pem"),
        file("nbd-key.pem"),
        file("ca-cert.pem"),
    );
    site.start();
    let disk = Disk::mixed(52, 50, 0);
    let image = folder.path().join("vm.raw");
    disk.write_to(&image);
    site.ok(&["volume", "add", "vm", "--image", text(&image)]);
    let friend = folder.path().join("hypervisor-1");
    let nobody = folder.path().join("nobody");
    std::fs::create_dir(&nobody).expect("a directory");
    std::fs::copy(folder.path().join("ca-cert.pem"), nobody.join("ca-cert.pem")).expect("copies");
    let served = Served { site, disk, friend, nobody, folder };
    if !is_missing(test, "qemu-img") {
        assert_fine(&served.qemu_img(&["info"], &served.friend), "qemu-img info");
        assert_refused(&served.qemu_img(&["info"], &served.nobody), "qemu-img without a certificate");
    }
    if !is_missing(test, "nbdinfo") && !has_no_tls(test) {
        let size = run(Command::new("nbdinfo").arg("--size").arg(served.uri(&served.friend)));
        assert_fine(&size, "nbdinfo");
        assert_eq!(size.out.trim(), served.disk.bytes.len().to_string());
    }
}

#[test]
fn a_listener_of_its_own_mind() {
    if is_missing("a_listener_of_its_own_mind", "nbdinfo") {
        return;
    }
    let served = serve("tls = \"optional\"");
    // The raw client knows no TLS.
    assert_eq!(served.site.nbd("vm").read_all().len(), served.disk.bytes.len());
    if has_no_tls("a_listener_of_its_own_mind") {
        return;
    }
    assert_fine(&run(Command::new("nbdinfo").arg(served.uri(&served.nobody))), "with TLS");
}

#[test]
fn wrong_files_are_refused_at_start_and_loose_ones_warned_of() {
    let folder = tempfile::Builder::new().prefix("ferry").tempdir().expect("a directory");
    let authority = Authority::new(folder.path(), "pki");
    authority.sign("server", ExtendedKeyUsagePurpose::ServerAuth);
    authority.sign("client", ExtendedKeyUsagePurpose::ClientAuth);
    let mut site = Site::new(folder.path(), "a");
    let file = |name: &str| authority.dir.join(name).display().to_string();
    for (key, names) in [("missing.pem", "cannot read"), ("client-key.pem", "is not the key of the certificate")] {
        site.nbd_lines = format!(
            "tls = \"required\"\ntls_certificate = \"{}\"\ntls_key = \"{}\"",
            file("server-cert.pem"),
            file(key),
        );
        let refused = site.refused_start();
        println!("{}", refused.err.trim_end());
        assert_eq!(refused.status.code(), Some(2), "{}", refused.err);
        assert!(refused.err.contains(names) && refused.err.contains(&file(key)), "{}", refused.err);
        assert!(refused.err.contains("[nbd] tls_key"), "{}", refused.err);
    }
    let key = file("server-key.pem");
    std::fs::set_permissions(&key, Permissions::from_mode(0o644)).expect("sets the mode");
    site.nbd_lines =
        format!("tls = \"optional\"\ntls_certificate = \"{}\"\ntls_key = \"{key}\"", file("server-cert.pem"));
    site.start();
    assert!(site.log().contains("can read the private key"), "{}", site.log());
    assert!(!site.log().contains("served without tls"), "the loopback is no network: {}", site.log());
}
