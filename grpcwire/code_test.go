package grpcwire

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

func TestCodeStringAgreesWithGRPC(t *testing.T) {
	for c := range Code(17) {
		// grpc-go reads the specification's names from JSON and writes camel case.
		var theirs codes.Code
		if err := json.Unmarshal([]byte(`"`+c.String()+`"`), &theirs); err != nil || uint32(theirs) != uint32(c) {
			t.Errorf("%d: grpc-go reads %q as %v, %v", uint32(c), c, theirs, err)
		}
		for _, s := range []string{c.String(), theirs.String()} {
			if got, err := ParseCode(s); err != nil || got != c {
				t.Errorf("ParseCode(%q) = %v, %v; want %v", s, got, err, c)
			}
		}
	}
}

func TestCodeStringUnknown(t *testing.T) {
	for c, want := range map[Code]string{17: "CODE(17)", 99: "CODE(99)", 1<<32 - 1: "CODE(4294967295)"} {
		if got := c.String(); got != want {
			t.Errorf("%d: %q, want %q", uint32(c), got, want)
		}
	}
}

func TestParseCode(t *testing.T) {
	for in, want := range map[string]Code{
		"0": OK, "ok": OK, "Ok": OK,
		"1": Canceled, "CANCELLED": Canceled, "CANCELED": Canceled, "Canceled": Canceled, "cancelled": Canceled,
		"4": DeadlineExceeded, "DEADLINE_EXCEEDED": DeadlineExceeded, "DeadlineExceeded": DeadlineExceeded,
		"deadlineexceeded": DeadlineExceeded, "Deadline_Exceeded": DeadlineExceeded,
		"14": Unavailable, "unavailable": Unavailable, "16": Unauthenticated, "016": Unauthenticated,
	} {
		if got, err := ParseCode(in); err != nil || got != want {
			t.Errorf("ParseCode(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", " ", "17", "-1", "+1", "1.0", "4294967296", "99999999999999999999", "UNAVAILABLE ", "DEADLINE-EXCEEDED",
		"DEADLINE__EXCEEDED", "_OK", "CODE(3)", "5xx",
	} {
		_, err := ParseCode(in)
		if err == nil {
			t.Errorf("ParseCode(%q) succeeded", in)
			continue
		}
		for _, part := range []string{`"` + in + `"`, "0 to 16", "OK", "DEADLINE_EXCEEDED", "UNAUTHENTICATED"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("error %q lacks %q", err, part)
			}
		}
	}
}

func TestCodeTextInJSON(t *testing.T) {
	var got []CodeText
	if err := json.Unmarshal([]byte(`["UNAVAILABLE", 14, "14", "{vars.code}"]`), &got); err != nil {
		t.Fatal(err)
	}
	if want := []CodeText{"UNAVAILABLE", "14", "14", "{vars.code}"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, raw := range []string{`[true]`, `[{}]`, `[["OK"]]`} {
		if err := json.Unmarshal([]byte(raw), &got); err == nil || !strings.Contains(err.Error(), "write a number from 0 to 16") {
			t.Errorf("%s: error %v, want one that says what to write", raw, err)
		}
	}
}
