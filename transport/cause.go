package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// innermost unwraps the layers of package net, whose texts carry addresses, down to the reason itself.
func innermost(err error) string {
	var (
		dns  *net.DNSError
		cert *tls.CertificateVerificationError
		when x509.CertificateInvalidError
		host x509.HostnameError
		errn syscall.Errno
		op   *net.OpError
		addr *net.AddrError
	)
	alert, isAlert := tlsAlert(err)
	switch {
	case errors.As(err, &dns):
		if dns.IsNotFound {
			return "the upstream's name does not exist in DNS"
		}
		return "looking up the upstream's name failed: " + dnsCause(dns)
	case errors.As(err, &host):
		return "the upstream's certificate is not valid for the name the proxy expects (set tls_server_name)"
	case errors.As(err, &when) && when.Reason == x509.Expired:
		// x509's own text has the time of day: each attempt would have another reason, and clients would read the clock.
		return "the upstream's certificate is not valid at this time (it has expired, or the clock is wrong)"
	case errors.As(err, &cert):
		return cert.Err.Error()
	case isAlert:
		return "the upstream sent the TLS alert " + strconv.Quote(alert)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the upstream closed it"
	case errors.As(err, &errn):
		return errn.Error()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "timed out"
	case errors.As(err, &addr):
		return addr.Err
	case errors.As(err, &op):
		return op.Err.Error()
	}
	return err.Error()
}

// dnsCause is why a look-up failed. The error's own text may name the DNS server.
func dnsCause(err *net.DNSError) string {
	var errn syscall.Errno
	switch {
	case err.IsTimeout:
		return "timed out"
	case errors.As(err, &errn):
		return errn.Error()
	case strings.ContainsAny(err.Err, ":/"): // the text of an error of package net
		return "the DNS server cannot be asked"
	}
	return err.Err
}

// tlsAlert returns the alert with which the peer ended TLS, such as "certificate required". crypto/tls has no type for
// alerts it receives.
func tlsAlert(err error) (string, bool) {
	op := new(net.OpError)
	if !errors.As(err, &op) || op.Op != "remote error" {
		return "", false
	}
	return strings.TrimPrefix(op.Err.Error(), "tls: "), true
}
